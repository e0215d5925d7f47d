{{/*
Certificates as files, each with only the keys that its reader needs: a Secret without one of them is an event of the
pod, not a program that fails. Whole folders are mounted, so that a renewed Secret reaches the program. Call with
(list $ role).
*/}}
{{- define "tandem.tlsVolumes" -}}
{{- $tls := (index . 0).Values.tls -}}
{{- if and (eq (index . 1) "gateway") $tls.clients.secretName }}
- name: tls-clients
  secret:
    secretName: {{ $tls.clients.secretName }}
    defaultMode: 0440
    items:
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
      {{- if and $tls.clients.requireClientCertificate (not $tls.clients.clientCaSecretName) }}
      - {key: ca.crt, path: ca.crt}
      {{- end }}
{{- with $tls.clients.clientCaSecretName }}
- name: tls-client-ca
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
{{- end }}
{{- end }}
{{- with $tls.peers.secretName }}
- name: tls-peers
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
      - {key: ca.crt, path: ca.crt}
{{- end }}
{{- end }}

{{- define "tandem.tlsMounts" -}}
{{- $tls := (index . 0).Values.tls -}}
{{- if and (eq (index . 1) "gateway") $tls.clients.secretName }}
- {name: tls-clients, mountPath: /etc/tandem-tls/clients, readOnly: true}
{{- if $tls.clients.clientCaSecretName }}
- {name: tls-client-ca, mountPath: /etc/tandem-tls/client-ca, readOnly: true}
{{- end }}
{{- end }}
{{- if $tls.peers.secretName }}
- {name: tls-peers, mountPath: /etc/tandem-tls/peers, readOnly: true}
{{- end }}
{{- end }}
