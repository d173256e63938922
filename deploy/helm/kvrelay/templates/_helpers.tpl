{{- define "kvrelay.name" -}}
{{ printf "%s-kvrelay" .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Labels of a component; takes (dict "root" $ "component" NAME). */}}
{{- define "kvrelay.selector" -}}
app.kubernetes.io/name: kvrelay
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
kvrelay.dev/model: {{ . }}
{{- end }}
{{- end }}

{{- define "kvrelay.labels" -}}
{{ include "kvrelay.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* A model's name as part of an object's name: shortened, with a digest, so that no two are alike. */}}
{{- define "kvrelay.modelKey" -}}
{{ printf "%s-%s" (regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trunc 20 | trimAll "-") (sha256sum . | trunc 6) }}
{{- end }}

{{- define "kvrelay.image" -}}
{{- $image := .image -}}
{{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "kvrelay.hardened" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What all pods have: identity, placement, pull secrets. Takes root, component, settings, and model where there is one. */}}
{{- define "kvrelay.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if .settings.affinity }}
affinity: {{ toYaml .settings.affinity | nindent 2 }}
{{- else }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{ include "kvrelay.selector" . | nindent 14 }}
{{- end }}
{{- end }}

{{- define "kvrelay.podMetadata" -}}
labels: {{ include "kvrelay.labels" . | nindent 2 }}
{{- with .root.Values.podLabels }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .root.Values.podAnnotations }}
annotations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The Secret volume of a role: its certificate, and Redis' password where it needs one. */}}
{{- define "kvrelay.secretVolume" -}}
{{- $name := include "kvrelay.name" .root -}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
{{- if .root.Values.credentials.certManager.enabled }}
      - secret:
          name: {{ $name }}-{{ .role }}-tls
          items:
            - {key: ca.crt, path: ca.pem}
            - {key: tls.crt, path: certificate.pem}
            - {key: tls.key, path: certificate.key}
{{- else }}
      - secret:
          name: {{ $name }}-{{ .role }}
          items:
            - {key: ca.pem, path: ca.pem}
            - {key: certificate.pem, path: certificate.pem}
            - {key: certificate.key, path: certificate.key}
{{- end }}
{{- if eq .role "gateway" }}
      - secret:
          name: {{ $name }}-gateway
          items: [{key: cache-secret, path: cache-secret}]
{{- end }}
{{- if eq .role "redis" }}
      - secret:
          name: {{ $name }}-redis
          items: [{key: users.acl, path: users.acl}]
{{- else if and (has .role (list "gateway" "prefill" "decode")) .root.Values.redis.existingSecret }}
      - secret:
          name: {{ .root.Values.redis.existingSecret }}
          items: [{key: redis-password-{{ eq .role "gateway" | ternary "gateway" "worker" }}, path: redis-password}]
{{- else if has .role (list "gateway" "prefill" "decode") }}
      - secret:
          name: {{ $name }}-{{ .role }}
          items: [{key: redis-password, path: redis-password}]
{{- end }}
{{- end }}

{{/* Environment of a process of kvrelay. Takes root, role and settings. */}}
{{- define "kvrelay.env" -}}
{{- $root := .root -}}
{{- $env := dict "KVRELAY_HTTP_PORT" "50080" "KVRELAY_TLS_CA" "/secrets/own/ca.pem" "KVRELAY_TLS_CERT" "/secrets/own/certificate.pem" "KVRELAY_TLS_KEY" "/secrets/own/certificate.key" "KVRELAY_TRUST_DOMAIN" $root.Values.credentials.trustDomain -}}
{{- if ne .role "front" -}}
{{- $isGateway := eq .role "gateway" -}}
{{- $_ := set $env "KVRELAY_REDIS_PASSWORD_FILE" "/secrets/own/redis-password" -}}
{{- if $root.Values.redis.enabled -}}
{{- $_ := set $env "KVRELAY_REDIS_URL" (printf "rediss://%s@%s-redis.%s.svc:6379/0" ($isGateway | ternary "gateway" "worker") (include "kvrelay.name" $root) $root.Release.Namespace) -}}
{{- $_ := set $env "KVRELAY_REDIS_TLS_CA" "/secrets/own/ca.pem" -}}
{{- $_ := set $env "KVRELAY_REDIS_TLS_CERT" "/secrets/own/certificate.pem" -}}
{{- $_ := set $env "KVRELAY_REDIS_TLS_KEY" "/secrets/own/certificate.key" -}}
{{- else -}}
{{- $_ := set $env "KVRELAY_REDIS_URL" (required "redis.enabled is false: give redis.urlOfGateways and redis.urlOfWorkers" ($isGateway | ternary $root.Values.redis.urlOfGateways $root.Values.redis.urlOfWorkers)) -}}
{{- end -}}
{{- end -}}
{{- with $root.Values.tracing.otlpEndpoint -}}{{- $_ := set $env "KVRELAY_OTLP_ENDPOINT" . -}}{{- end -}}
{{- with $root.Values.tracing.ratio -}}{{- if eq $.role "gateway" -}}{{- $_ := set $env "KVRELAY_TRACE_RATIO" (toString .) -}}{{- end -}}{{- end -}}
{{- $_ := set $env "KVRELAY_DRAIN_TIMEOUT_MS" (.settings.drainSeconds | default 25 | mul 1000 | toString) -}}
{{- range $key, $value := .settings.env -}}{{- $_ := set $env $key (toString $value) -}}{{- end -}}
{{- range $key, $value := $env }}
- name: {{ $key }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Probes ask /healthz, which is 503 while a process drains: then it gets no new work, and is not killed. */}}
{{- define "kvrelay.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http, scheme: HTTPS}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ .startupFailures }}
readinessProbe:
  httpGet: {path: /healthz, port: http, scheme: HTTPS}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  tcpSocket: {port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* Peers of a NetworkPolicy. Takes root and components. */}}
{{- define "kvrelay.from" -}}
{{- range .components }}
- podSelector:
    matchLabels: {{ include "kvrelay.selector" (dict "root" $.root "component" .) | nindent 6 }}
{{- end }}
{{- end }}
