{{/* The program's own settings, as its --config file has them. Call with (list $ role). */}}
{{- define "tandem.config" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $v := $root.Values -}}
{{- $values := index $v $role -}}
{{- include "tandem.ownedChecks" . -}}
{{- $path := $v.model.path -}}
{{- if $v.model.claim }}{{ $path = printf "/models/%s" $path }}{{ end -}}
{{- $model := dict "path" $path "revision" $v.model.revision "served_name" $v.model.servedName "dtype" $v.model.dtype "device" $v.model.device "max_context_tokens" (int $v.model.maxContextTokens) -}}
{{- $server := dict "host" "0.0.0.0" "port" 50051 "metrics_port" 9090 "drain_seconds" $values.drain.seconds "log_level" $v.logging.level "log_format" $v.logging.format -}}
{{- $telemetry := dict "otlp_endpoint" $v.telemetry.otlpEndpoint "trace_ratio" $v.telemetry.traceRatio "vllm_metrics" $v.telemetry.vllmMetrics "genai_metrics" $v.telemetry.genaiMetrics -}}
{{- $config := dict "model" $model "server" $server "telemetry" $telemetry -}}
{{- if eq $role "gateway" -}}
{{- $_ := set $server "drain_delay_seconds" $values.drain.delaySeconds -}}
{{- $_ := set $config "discovery" (include "tandem.discoveryConfig" $root | fromYaml) -}}
{{- else -}}
{{- $_ := set $config "scheduler" (dict "loop" $values.loop) -}}
{{- $sizes := $values.parallel -}}
{{- $_ := set $config "parallel" (dict "tensor_size" (int $sizes.tensorSize) "pipeline_size" (int $sizes.pipelineSize) "data_size" (int $sizes.dataSize) "expert_size" (int $sizes.expertSize)) -}}
{{- if $values.hugePages }}{{ $_ := set $config "cache" (dict "huge_pages" "require" "pool_bytes" (include "tandem.hugePoolBytes" . | int64)) }}{{ end -}}
{{- if ne $role "unified" -}}
{{- $_ := set $config "transfer" (include "tandem.transferConfig" $root | fromYaml) -}}
{{- $_ := set $config.transfer "port" (include "tandem.kvPorts" . | fromYamlArray | first | int) -}}
{{- end -}}
{{- if eq $role "prefill" }}{{ $_ := set $server "handoff_port" 50053 }}{{ end -}}
{{- end -}}
{{- with include "tandem.tlsConfig" . | fromYaml }}{{ $_ := set $config "tls" . }}{{ end -}}
{{- mustMergeOverwrite $config (deepCopy $v.config) (deepCopy $values.config) | toPrettyJson -}}
{{- end }}

{{- define "tandem.discoveryConfig" -}}
mode: {{ .Values.discovery.mode }}
{{- if eq .Values.discovery.mode "dns" }}
dns_names:
  {{- range $worker := splitList "," (include "tandem.roles" .) }}
  - {{ include "tandem.fullname" $ }}-{{ $worker }}-headless.{{ $.Release.Namespace }}.svc:50051
  {{- end }}
{{- else }}
namespace: {{ .Release.Namespace }}
selector: app.kubernetes.io/name={{ include "tandem.name" . }},app.kubernetes.io/instance={{ .Release.Name }},llm-d.ai/role
port_name: grpc
{{- end }}
{{- end }}

{{/* Ranks of all replicas in a worker's pod: each has a pool and a transfer process. Call with (list $ role). */}}
{{- define "tandem.numPools" -}}
{{- $sizes := (index (index . 0).Values (index . 1)).parallel -}}
{{- mul (int $sizes.tensorSize) (int $sizes.pipelineSize) (int $sizes.dataSize) -}}
{{- end }}

{{/* cache.pool_bytes that fills the pod's huge pages: each pool but one may need a part of a page beyond its share. */}}
{{- define "tandem.hugePoolBytes" -}}
{{- $role := index . 1 -}}
{{- $given := (index (index . 0).Values $role).hugePages -}}
{{- $pages := hasSuffix "Gi" $given | ternary 512 1 | mul (trimSuffix "Gi" $given | trimSuffix "Mi" | int64) -}}
{{- if hasSuffix "Mi" $given }}{{ $pages = div $pages 2 }}{{ end -}}
{{- $pools := include "tandem.numPools" . | int64 -}}
{{- if lt $pages (mul 2 $pools) -}}
{{- fail (printf "%s.hugePages: %s are %d huge pages, the %d pools of a pod need two each at least" $role $given $pages $pools) -}}
{{- end -}}
{{- mul (sub $pages $pools | add 1) 2097152 -}}
{{- end }}

{{/* The KV ports of a worker: one a transfer process. */}}
{{- define "tandem.kvPorts" -}}
{{- $count := include "tandem.numPools" . | int -}}
{{- $first := gt $count 1 | ternary 50100 50052 -}}
{{- range untilStep $first (add $first $count | int) 1 }}
- {{ . }}
{{- end }}
{{- end }}

{{- define "tandem.transferConfig" -}}
transport: {{ .Values.transport }}
{{- if include "tandem.mooncake" . }}
trusted_network: true
mooncake_devices: {{ .Values.rdma.devices | quote }}
mooncake_port_min: {{ int .Values.rdma.portMin }}
mooncake_port_max: {{ int .Values.rdma.portMax }}
{{- end }}
{{- end }}

{{- define "tandem.tlsConfig" -}}
{{- $tls := (index . 0).Values.tls -}}
{{- $clients := and (eq (index . 1) "gateway") $tls.clients.secretName -}}
{{- if $clients }}
certificate_file: /etc/tandem-tls/clients/tls.crt
key_file: /etc/tandem-tls/clients/tls.key
{{- if $tls.clients.requireClientCertificate }}
client_ca_file: /etc/tandem-tls/{{ $tls.clients.clientCaSecretName | empty | ternary "clients" "client-ca" }}/ca.crt
{{- end }}
{{- end }}
{{- if $tls.peers.secretName }}
peer_certificate_file: /etc/tandem-tls/peers/tls.crt
peer_key_file: /etc/tandem-tls/peers/tls.key
peer_ca_file: /etc/tandem-tls/peers/ca.crt
peer_name: {{ $tls.peers.name | quote }}
{{- end }}
{{- if or $clients $tls.peers.secretName }}
reload_seconds: {{ $tls.reloadSeconds }}
{{- end }}
{{- end }}
