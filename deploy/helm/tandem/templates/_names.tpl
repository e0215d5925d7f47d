{{- define "tandem.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/*
At most 46 characters, so that the longest suffix, -gateway-headless, still makes a Service's name of 63. A longer name
is cut and carries a hash of the whole: two long releases in one namespace never share an object.
*/}}
{{- define "tandem.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = .Release.Name | replace "." "-" -}}
{{- if not (contains (include "tandem.name" .) $name) }}{{ $name = printf "%s-%s" $name (include "tandem.name" .) }}{{ end -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $name) -}}
{{- fail (printf "fullnameOverride: Services must be named with a letter first, and the release is %s: give a name" .Release.Name) -}}
{{- end -}}
{{- if gt (len $name) 46 -}}
{{- $name = printf "%s-%s" ($name | trunc 37 | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
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

{{/* "true" if the cluster is at least of a version. Call with (list $ "1.24"). */}}
{{- define "tandem.since" -}}
{{- $root := index . 0 -}}
{{- $version := $root.Values.kubeVersion | default $root.Capabilities.KubeVersion.Version -}}
{{- if semverCompare (printf ">=%s-0" (index . 1)) $version }}true{{ end -}}
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

{{/* "true" if Mooncake may carry KV pages, and so needs its ports. */}}
{{- define "tandem.mooncake" -}}
{{- if and .Values.rdma.trustedNetwork (ne .Values.transport "tcp") }}true{{ end -}}
{{- end }}

{{/* "true" if the role's pods are in their node's network, where a NetworkPolicy is not applied. Call with (list $ role). */}}
{{- define "tandem.hostNetwork" -}}
{{- $rdma := (index . 0).Values.rdma -}}
{{- if and $rdma.enabled $rdma.hostNetwork (ne (index . 1) "gateway") }}true{{ end -}}
{{- end }}

{{/* "true" if weights are downloaded: neither built in, nor a folder. */}}
{{- define "tandem.downloads" -}}
{{- $model := .Values.model -}}
{{- if not (or (eq $model.path "demo") $model.claim (hasPrefix "/" $model.path)) }}true{{ end -}}
{{- end }}

{{/* How the role's gRPC port is to be spoken to by what stands before it. Call with (list $ role). */}}
{{- define "tandem.appProtocol" -}}
{{- $tls := (index . 0).Values.tls -}}
{{- $secret := eq (index . 1) "gateway" | ternary $tls.clients.secretName $tls.peers.secretName -}}
{{- $secret | empty | ternary "kubernetes.io/h2c" "https" -}}
{{- end }}
