{{- define "quickbloom.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 25 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 14 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end -}}

{{/* What selects all pods of this release. */}}
{{- define "quickbloom.ours" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What selects the pods of one component: list ROOT COMPONENT. */}}
{{- define "quickbloom.selector" -}}
{{ include "quickbloom.ours" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "quickbloom.labels" -}}
{{ include "quickbloom.selector" . }}
{{- with index . 0 }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
{{- end -}}

{{/* The image: list ROOT TAG, where TAG may be empty. */}}
{{- define "quickbloom.image" -}}
{{- with index . 0 -}}
image: {{ printf "%s:%s" .Values.image.repository (index $ 1 | default .Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}
{{- end -}}

{{/* What every pod has. User 49999 is the image's; the shared process namespace has a first process that reaps, as `init` of Compose. */}}
{{- define "quickbloom.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
shareProcessNamespace: true
securityContext:
  runAsNonRoot: true
  runAsUser: 49999
  runAsGroup: 49999
  fsGroup: 49999
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What every container has. */}}
{{- define "quickbloom.hardened" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  privileged: false
{{- end -}}

{{/* The folders that a process may write to besides its volumes. */}}
{{- define "quickbloom.scratchMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: flower-home, mountPath: /app/.flwr}
{{- end -}}

{{- define "quickbloom.scratch" -}}
- {name: tmp, emptyDir: {}}
- {name: flower-home, emptyDir: {}}
{{- end -}}

{{/* How the command line reaches the SuperLink. */}}
{{- define "quickbloom.connectionMounts" -}}
{{ include "quickbloom.scratchMounts" . }}
- {name: connection, mountPath: /app/.flwr/config.toml, subPath: config.toml, readOnly: true}
- {name: secrets, mountPath: /secrets, readOnly: true}
{{- end -}}

{{- define "quickbloom.connection" -}}
{{ include "quickbloom.scratch" . }}
- name: connection
  configMap: {name: {{ include "quickbloom.fullname" . }}-connection}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- include "quickbloom.ca" (list . .Values.cli.secret "ca.crt") | nindent 6 }}
{{- end -}}

{{- define "quickbloom.tlsSecret" -}}
{{ include "quickbloom.fullname" . }}-superlink-tls
{{- end -}}

{{/* The CA's certificate, which is no secret, under a path: list ROOT SECRET PATH. */}}
{{- define "quickbloom.ca" -}}
{{- $root := index . 0 -}}
- secret:
    name: {{ ternary (include "quickbloom.tlsSecret" $root) (index . 1) (and $root.Values.server $root.Values.tls.certManager.enabled) | quote }}
    items: [{key: ca.crt, path: {{ index . 2 | quote }}}]
{{- end -}}

{{/* A value as the command line takes it: whole numbers stay whole. */}}
{{- define "quickbloom.plain" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{/* `--set KEY=VALUE` for every entry. */}}
{{- define "quickbloom.settings" -}}
{{- range $key, $value := . }}
- "--set"
- {{ printf "%s=%s" $key (include "quickbloom.plain" $value) | quote }}
{{- end }}
{{- end -}}

{{/* A health check of the image: list ARGUMENTS.. */}}
{{- define "quickbloom.check" -}}
exec: {command: ["python", "-I", "-S", "/opt/quickbloom/healthcheck.py"{{ range . }}, {{ . | quote }}{{ end }}]}
timeoutSeconds: 8
{{- end -}}

{{- define "quickbloom.secretOf" -}}
{{- .secret | default (printf "quickbloom-%s" .name) -}}
{{- end -}}

{{- define "quickbloom.runsClaim" -}}
{{- .Values.superexec.runs.existingClaim | default (printf "%s-runs" (include "quickbloom.fullname" .)) -}}
{{- end -}}

{{/* Names, not addresses, under which the SuperLink is reached. */}}
{{- define "quickbloom.hosts" -}}
{{- $name := include "quickbloom.fullname" . -}}
{{- range $service := list "superlink" "superlink-control" }}
- {{ $name }}-{{ $service }}
- {{ $name }}-{{ $service }}.{{ $.Release.Namespace }}
- {{ $name }}-{{ $service }}.{{ $.Release.Namespace }}.svc
{{- end }}
- localhost
{{- range .Values.tls.hosts }}
{{- if not (regexMatch "^([0-9.]+|.*:.*)$" .) }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}
