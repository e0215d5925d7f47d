{{/* The program's own settings, as its --config file has them. Call with (list $ role). */}}
{{- define "tandem.config" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $v := $root.Values -}}
{{- $values := index $v $role -}}
{{- $path := $v.model.path -}}
{{- if $v.model.claim }}{{ $path = printf "/models/%s" $path }}{{ end -}}
{{- $name := $v.model.servedName -}}
{{- $model := dict "path" $path "revision" $v.model.revision "served_name" $name "dtype" $v.model.dtype "device" $v.model.device "max_context_tokens" (int $v.model.maxContextTokens) -}}
{{- $server := dict "host" "0.0.0.0" "port" 50051 "metrics_port" 9090 "drain_seconds" $values.drain.seconds "log_level" $v.logging.level "log_format" $v.logging.format -}}
{{- $config := dict "model" $model "server" $server -}}
{{- if eq $role "gateway" -}}
{{- $_ := set $server "drain_delay_seconds" $values.drain.delaySeconds -}}
{{- if eq $v.discovery.mode "dns" -}}
{{- $names := list -}}
{{- range $worker := splitList "," (include "tandem.roles" $root) -}}
{{- $names = append $names (printf "%s-%s-headless.%s.svc:50051" (include "tandem.fullname" $root) $worker $root.Release.Namespace) -}}
{{- end -}}
{{- $_ := set $config "discovery" (dict "mode" "dns" "dns_names" $names) -}}
{{- else -}}
{{- $selector := printf "app.kubernetes.io/name=%s,app.kubernetes.io/instance=%s,llm-d.ai/role" (include "tandem.name" $root) $root.Release.Name -}}
{{- $_ := set $config "discovery" (dict "mode" "kubernetes" "namespace" $root.Release.Namespace "selector" $selector "port_name" "grpc") -}}
{{- end -}}
{{- else -}}
{{- $_ := set $config "scheduler" (dict "loop" $values.loop) -}}
{{- if ne $role "unified" -}}
{{- $transfer := dict "transport" $v.transport "port" 50052 -}}
{{- if $v.rdma.enabled -}}
{{- $transfer = merge (dict "trusted_network" $v.rdma.trustedNetwork "mooncake_devices" $v.rdma.devices "mooncake_port_min" (int $v.rdma.portMin) "mooncake_port_max" (int $v.rdma.portMax)) $transfer -}}
{{- end -}}
{{- $_ := set $config "transfer" $transfer -}}
{{- end -}}
{{- if eq $role "prefill" }}{{ $_ := set $server "handoff_port" 50053 }}{{ end -}}
{{- end -}}
{{- mustMergeOverwrite $config (deepCopy $v.config) (deepCopy $values.config) | toPrettyJson -}}
{{- end }}
