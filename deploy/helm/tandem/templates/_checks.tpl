{{/*
What each value may be alone is in values.schema.json; here is what does not fit together. Everything that is refused
is refused by name, before anything in the cluster changes.
*/}}
{{- define "tandem.checks" -}}
{{- $v := .Values -}}
{{- $roles := compact (splitList "," (include "tandem.roles" .)) -}}
{{- if not (or (has "decode" $roles) (has "unified" $roles)) -}}
{{- fail "decode.replicas, unified.replicas: nobody would answer; give at least one" -}}
{{- end -}}
{{- if and (has "prefill" $roles) (not (has "decode" $roles)) -}}
{{- fail "prefill.replicas: prefill workers compute for decode workers, and decode.replicas is 0; set prefill.replicas to 0 as well" -}}
{{- end -}}
{{- range $role := append $roles "gateway" -}}
{{- $values := index $v $role -}}
{{- if and (has (toString $values.strategy.maxUnavailable) (list "0" "0%")) (has (toString $values.strategy.maxSurge) (list "0" "0%")) -}}
{{- fail (printf "%s.strategy: maxUnavailable and maxSurge are both 0; a rolling update could never move" $role) -}}
{{- end -}}
{{- if gt (int $values.autoscaling.minReplicas) (int $values.autoscaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling.minReplicas: above maxReplicas" $role) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.discovery.mode "kubernetes") (not $v.serviceAccount.create) (not $v.serviceAccount.name) -}}
{{- fail "serviceAccount.name: name an existing account for the gateway, or let the chart create one, or use discovery.mode: dns" -}}
{{- end -}}
{{- if and $v.gateway.service.nodePort (eq $v.gateway.service.type "ClusterIP") -}}
{{- fail "gateway.service.nodePort: only with gateway.service.type NodePort or LoadBalancer" -}}
{{- end -}}
{{- if $v.probes.grpc -}}
{{- if not (include "tandem.since" (list . "1.24")) -}}
{{- fail "probes.grpc: native gRPC probes need Kubernetes 1.24; leave it false" -}}
{{- end -}}
{{- if or $v.tls.clients.secretName $v.tls.peers.secretName -}}
{{- fail "probes.grpc: native gRPC probes cannot speak TLS; leave it false where tls.clients.secretName or tls.peers.secretName is set" -}}
{{- end -}}
{{- end -}}
{{- with $v.tls.clients -}}
{{- if and (not .secretName) (or .requireClientCertificate .clientCaSecretName) -}}
{{- fail "tls.clients.secretName: needed for tls.clients.requireClientCertificate and tls.clients.clientCaSecretName" -}}
{{- end -}}
{{- if and .clientCaSecretName (not .requireClientCertificate) -}}
{{- fail "tls.clients.clientCaSecretName: without effect unless tls.clients.requireClientCertificate is true" -}}
{{- end -}}
{{- end -}}
{{- include "tandem.rdmaChecks" . -}}
{{- end }}

{{- define "tandem.rdmaChecks" -}}
{{- $v := .Values -}}
{{- if and $v.rdma.enabled (not $v.rdma.trustedNetwork) -}}
{{- fail "rdma.trustedNetwork: RDMA goes through Mooncake, which authenticates nobody; set it to true if everybody who can reach the KV ports is trusted, or rdma.enabled to false" -}}
{{- end -}}
{{- if and (hasPrefix "mooncake" $v.transport) (not $v.rdma.trustedNetwork) -}}
{{- fail (printf "rdma.trustedNetwork: transport %s needs it, since Mooncake authenticates nobody" $v.transport) -}}
{{- end -}}
{{- if and (eq $v.transport "mooncake-rdma") (not $v.rdma.enabled) -}}
{{- fail "rdma.enabled: transport mooncake-rdma needs it" -}}
{{- end -}}
{{- if and $v.rdma.enabled (has $v.transport (list "tcp" "mooncake-tcp")) -}}
{{- fail (printf "transport: rdma.enabled takes devices that transport %s does not use" $v.transport) -}}
{{- end -}}
{{- if gt (int $v.rdma.portMin) (int $v.rdma.portMax) -}}
{{- fail "rdma.portMin: above rdma.portMax" -}}
{{- end -}}
{{- if and (include "tandem.mooncake" .) $v.networkPolicy.enabled (not (include "tandem.since" (list . "1.22"))) (gt (sub (int $v.rdma.portMax) (int $v.rdma.portMin)) 63) -}}
{{- fail "rdma.portMin, rdma.portMax: before Kubernetes 1.22 a NetworkPolicy has no port ranges; give at most 64 ports, or set networkPolicy.enabled to false" -}}
{{- end -}}
{{- end }}

{{/*
Fields of the program's file that the chart writes, and the value that each is set by; "": nobody but the chart sets it.
Written twice, ports, mounts, rights or grace periods would no longer fit what the program does. Call with (list $ role).
*/}}
{{- define "tandem.owned" -}}
model.path: model.path
model.revision: model.revision
model.served_name: model.servedName
model.dtype: model.dtype
model.device: model.device
model.max_context_tokens: model.maxContextTokens
scheduler.loop: ROLE.loop
parallel.tensor_size: ROLE.parallel.tensorSize
parallel.pipeline_size: ROLE.parallel.pipelineSize
parallel.data_size: ROLE.parallel.dataSize
parallel.expert_size: ROLE.parallel.expertSize
transfer.transport: transport
transfer.trusted_network: rdma.trustedNetwork
transfer.port: ""
transfer.mooncake_devices: rdma.devices
transfer.mooncake_port_min: rdma.portMin
transfer.mooncake_port_max: rdma.portMax
server.host: ""
server.port: ""
server.advertise_host: ""
server.metrics_port: ""
server.handoff_port: ""
server.drain_delay_seconds: gateway.drain.delaySeconds
server.drain_seconds: ROLE.drain.seconds
server.log_level: logging.level
server.log_format: logging.format
gateway.prefill: discovery.mode
gateway.decode: discovery.mode
discovery.mode: discovery.mode
discovery.dns_names: discovery.mode
discovery.namespace: ""
discovery.selector: ""
discovery.port_name: ""
discovery.kubeconfig: ""
tls.certificate_file: tls.clients.secretName
tls.key_file: tls.clients.secretName
tls.client_ca_file: tls.clients.requireClientCertificate
tls.peer_certificate_file: tls.peers.secretName
tls.peer_key_file: tls.peers.secretName
tls.peer_ca_file: tls.peers.secretName
tls.peer_name: tls.peers.name
tls.reload_seconds: tls.reloadSeconds
telemetry.otlp_endpoint: telemetry.otlpEndpoint
telemetry.trace_ratio: telemetry.traceRatio
telemetry.vllm_metrics: telemetry.vllmMetrics
telemetry.genai_metrics: telemetry.genaiMetrics
{{- if (index (index . 0).Values (index . 1)).hugePages }}
cache.huge_pages: ROLE.hugePages
cache.pool_bytes: ROLE.hugePages
{{- end }}
{{- end }}

{{/* Refuse what a `config` value says about the chart's own fields. Call with (list $ role). */}}
{{- define "tandem.ownedChecks" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $owned := include "tandem.owned" . | fromYaml -}}
{{- range $place, $config := dict "config" $root.Values.config (printf "%s.config" $role) (index $root.Values $role).config -}}
{{- range $section, $fields := $config -}}
{{- range $field, $_ := $fields -}}
{{- $key := printf "%s.%s" $section $field -}}
{{- if hasKey $owned $key -}}
{{- $by := get $owned $key | replace "ROLE" $role -}}
{{- fail (printf "%s.%s: %s" $place $key (ternary "the chart sets it, it cannot be changed" (printf "the chart sets it, from the value %s" $by) (empty $by))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Seconds until SIGKILL: as given, if that is enough, else what the role needs. Call with (list $ role). */}}
{{- define "tandem.grace" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
{{- $lease := 0.0 -}}
{{- if eq $role "prefill" -}}
{{- $lease = dig "handoff" "lease_seconds" (dig "handoff" "lease_seconds" 10.0 $root.Values.config) $values.config -}}
{{- end -}}
{{- $needs := addf $values.preStopSeconds (dig "delaySeconds" 0 $values.drain) $values.drain.seconds $lease | ceil | int -}}
{{- $given := int $values.terminationGracePeriodSeconds -}}
{{- if and (gt $given 0) (lt $given (add $needs 5 | int)) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %d; preStop, drain and lease take %d s, and 5 s are needed to end: give at least %d, or 0" $role $given $needs (add $needs 5 | int)) -}}
{{- end -}}
{{- if gt $given 0 }}{{ $given }}{{ else }}{{ add $needs 15 }}{{ end -}}
{{- end }}
