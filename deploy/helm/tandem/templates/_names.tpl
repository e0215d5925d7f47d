{{- define "tandem.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "tandem.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tandem.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* Minimal and immutable: what a Deployment selects by can never change. Call with (list $ role). */}}
{{- define "tandem.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "tandem.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "tandem.labels" -}}
{{- $root := index . 0 -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/part-of: tandem
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tandem.image" -}}
{{- $root := index . 0 -}}
{{- $image := $root.Values.image -}}
{{- if $image.registry }}{{ $image.registry }}/{{ end }}{{ index $image (index . 1) }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end }}

{{- define "tandem.account" -}}
{{- .Values.serviceAccount.name | default (printf "%s-gateway" (include "tandem.fullname" .)) -}}
{{- end }}

{{/* The worker roles that run at all, as a comma separated list. */}}
{{- define "tandem.roles" -}}
{{- $roles := list -}}
{{- range $role := list "prefill" "decode" "unified" -}}
{{- $values := index $.Values $role -}}
{{- if or (gt (int $values.replicas) 0) $values.autoscaling.enabled -}}
{{- $roles = append $roles $role -}}
{{- end -}}
{{- end -}}
{{- join "," $roles -}}
{{- end }}

{{/* Seconds until SIGKILL: as given, if that is enough, else what the role needs. Call with (list $ role). */}}
{{- define "tandem.grace" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
{{- $lease := 0 -}}
{{- if eq $role "prefill" -}}
{{- $lease = dig "handoff" "lease_seconds" (dig "handoff" "lease_seconds" 10 $root.Values.config) $values.config | ceil | int -}}
{{- end -}}
{{- $needs := add $values.preStopSeconds (dig "delaySeconds" 0 $values.drain) $values.drain.seconds $lease -}}
{{- $given := int $values.terminationGracePeriodSeconds -}}
{{- if and (gt $given 0) (lt $given (int (add $needs 5))) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %d; preStop, drain and lease take %d s, and 5 s are needed to end: give at least %d, or 0" $role $given (int $needs) (int (add $needs 5))) -}}
{{- end -}}
{{- if gt $given 0 }}{{ $given }}{{ else }}{{ add $needs 15 }}{{ end -}}
{{- end }}
