{{/* What gateway and worker pods have in common. Call with (list $ role). */}}

{{- define "tandem.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
labels: # without the chart's version: pods are not replaced for it
  {{- include "tandem.selector" . | nindent 2 }}
  app.kubernetes.io/part-of: tandem
  app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
  {{- if ne $role "gateway" }}
  llm-d.ai/role: {{ $role }}
  {{- end }}
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/config: {{ include "tandem.config" . | sha256sum }}
  {{- if and $root.Values.rdma.enabled $root.Values.rdma.network (ne $role "gateway") }}
  k8s.v1.cni.cncf.io/networks: {{ $root.Values.rdma.network | quote }}
  {{- end }}
  {{- with $values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "tandem.podPlacement" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
terminationGracePeriodSeconds: {{ include "tandem.grace" . }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- include "tandem.pullSecrets" $root }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- with $values.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "tandem.selector" (list $root $role) | nindent 8 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "tandem.pullSecrets" }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Of every container here, the test's included: what the restricted profile asks for. */}}
{{- define "tandem.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "tandem.container" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
- name: {{ $role }}
  image: {{ include "tandem.image" (list $root (eq $role "gateway" | ternary "gateway" "worker")) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: [{{ $role }}, --config, /etc/tandem/config.json]
  env:
    - name: TANDEM_SERVER__ADVERTISE_HOST
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    {{- if include "tandem.downloads" $root }}
    - {name: HF_HOME, value: /var/cache/huggingface}
    {{- end }}
    {{- with $root.Values.model.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $root.Values.model.tokenSecret.key }}}}
    {{- end }}
    {{- with $values.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: grpc, containerPort: 50051, protocol: TCP}
    - {name: metrics, containerPort: 9090, protocol: TCP}
    {{- if has $role (list "prefill" "decode") }}
    {{- range $index, $port := include "tandem.kvPorts" . | fromYamlArray }}
    - {name: kv{{ if $index }}-{{ $index }}{{ end }}, containerPort: {{ $port }}, protocol: TCP}
    {{- end }}
    {{- end }}
    {{- if eq $role "prefill" }}
    - {name: handoff, containerPort: 50053, protocol: TCP}
    {{- end }}
  {{- include "tandem.probes" . | trim | nindent 2 }}
  {{- if gt (int $values.preStopSeconds) 0 }}
  lifecycle:
    preStop: {exec: {command: [sleep, {{ $values.preStopSeconds | quote }}]}}
  {{- end }}
  resources:
    {{- include "tandem.resources" . | nindent 4 }}
  securityContext:
    {{- include "tandem.containerSecurity" $root | nindent 4 }}
      {{- if and $root.Values.rdma.enabled (ne $role "gateway") }}
      add: [IPC_LOCK] # RDMA pins memory
      {{- end }}
  volumeMounts:
    - {name: config, mountPath: /etc/tandem, readOnly: true}
    - {name: tmp, mountPath: /tmp}
    {{- if include "tandem.downloads" $root }}
    - {name: hub, mountPath: /var/cache/huggingface}
    {{- end }}
    {{- if $root.Values.model.claim }}
    - {name: models, mountPath: /models, readOnly: true}
    {{- end }}
    {{- with include "tandem.tlsMounts" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $values.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "tandem.volumes" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
- name: config
  configMap: {name: {{ include "tandem.fullname" $root }}-{{ $role }}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- if include "tandem.downloads" $root }}
- name: hub
  {{- if $root.Values.model.cacheClaim }}
  persistentVolumeClaim: {claimName: {{ $root.Values.model.cacheClaim }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ $root.Values.model.cacheSizeLimit }}}
  {{- end }}
{{- end }}
{{- with $root.Values.model.claim }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- with include "tandem.tlsVolumes" . | trim }}
{{ . }}
{{- end }}
{{- with $values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tandem.resources" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
{{- $resources := deepCopy $values.resources -}}
{{- $added := dict -}}{{/* requests must be equal to limits for these */}}
{{- if ne $role "gateway" -}}
{{- if $root.Values.rdma.enabled }}{{ $_ := set $added $root.Values.rdma.resourceName (toString $root.Values.rdma.resourceCount) }}{{ end -}}
{{- if $values.hugePages }}{{ $_ := set $added "hugepages-2Mi" $values.hugePages }}{{ end -}}
{{- end -}}
{{- range $kind := $added | empty | ternary list (list "limits" "requests") -}}
{{- $_ := set $resources $kind (mergeOverwrite (get $resources $kind | default dict) $added) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- define "tandem.probes" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $probes := $root.Values.probes -}}
{{- $starts := eq $role "gateway" | ternary "live" "ready" -}}
{{- range $kind, $asks := dict "startup" $starts "readiness" "ready" "liveness" "live" -}}
{{ $kind }}Probe:
  {{- if $probes.grpc }}
  grpc: {port: 50051, service: {{ eq $asks "live" | ternary "liveness" "readiness" }}}
  {{- else }}
  httpGet: {path: /{{ $asks }}z, port: metrics}
  {{- end }}
  {{- toYaml (index $probes $kind) | nindent 2 }}
{{ end }}
{{- end }}
