{{/*
Fills in what the values lack. `helm upgrade --reuse-values` brings the values of the earlier chart, which know nothing of keys
that are new in this one. Each template includes this first; files/values.yaml is a copy of this chart's values.yaml.
Left alone is what a user may want to be without (`null`): resources, security contexts and single labels.
*/}}
{{- define "isthmus.defaults" -}}
{{- include "isthmus.fill" (list .Values (.Files.Get "files/values.yaml" | fromYaml)) -}}
{{- end -}}

{{- define "isthmus.fill" -}}
{{- $values := index . 0 -}}
{{- range $key, $default := index . 1 -}}
{{- if has $key (list "resources" "podSecurityContext" "securityContext") -}}
{{- else if not (hasKey $values $key) -}}
{{- $_ := set $values $key $default -}}
{{- else if and (ne $key "labels") (kindIs "map" $default) (kindIs "map" (get $values $key)) -}}
{{- include "isthmus.fill" (list (get $values $key) $default) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "isthmus.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/*
The names of Services begin with it, and end with -operator-metrics and the like: 63 characters at most, no dot, a letter first.
The names of releases know none of these rules.
*/}}
{{- define "isthmus.fullname" -}}
{{- $name := include "isthmus.name" . -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- $full := .Values.fullnameOverride -}}
{{- if $full -}}
{{- else if not (regexMatch "^[a-z]" $release) -}}
{{- $full = printf "%s-%s" $name $release -}}
{{- else if contains $name $release -}}
{{- $full = $release -}}
{{- else -}}
{{- $full = printf "%s-%s" $release $name -}}
{{- end -}}
{{- $full | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{- define "isthmus.operator" -}}
{{- include "isthmus.fullname" . }}-operator
{{- end -}}

{{- define "isthmus.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "isthmus.operator" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Cluster-scoped names carry the namespace, so that two releases of one name do not meet. */}}
{{- define "isthmus.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "isthmus.operator" .) -}}
{{- end -}}

{{- define "isthmus.selectorLabels" -}}
app.kubernetes.io/name: {{ include "isthmus.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "isthmus.testLabels" -}}
app.kubernetes.io/name: {{ include "isthmus.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: test
{{- end -}}

{{- define "isthmus.labels" -}}
{{- include "isthmus.labelsWith" (list . dict) -}}
{{- end -}}

{{/* The labels of an object, and those of the list's second item. Nobody can change those that selectors go by. */}}
{{- define "isthmus.labelsWith" -}}
{{- $context := index . 0 -}}
{{- $selected := include "isthmus.selectorLabels" $context | fromYaml -}}
{{- $own := dict "app.kubernetes.io/part-of" "isthmus" "app.kubernetes.io/version" ($context.Chart.AppVersion | replace "+" "_") -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" $context.Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" $context.Chart.Name $context.Chart.Version | replace "+" "_") -}}
{{- merge $selected (index . 1 | default dict) ($context.Values.commonLabels | default dict) $own | toYaml -}}
{{- end -}}

{{/* The annotations of an object: the common ones, and those of the list's second item, which win. */}}
{{- define "isthmus.annotations" -}}
{{- with merge (dict) (index . 1 | default dict) (index . 0).Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A registry takes the place of the one in the repository, if that names one. */}}
{{- define "isthmus.image" -}}
{{- $repository := .Values.image.repository -}}
{{- with (.Values.global | default dict).imageRegistry | default .Values.image.registry -}}
{{- $parts := splitList "/" $repository -}}
{{- if and (gt (len $parts) 1) (regexMatch "[.:]|^localhost$" (first $parts)) -}}
{{- $parts = rest $parts -}}
{{- end -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) (join "/" $parts) -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ .Values.image.tag | default (.Chart.AppVersion | replace "+" "_") }}
{{- end -}}
{{- end -}}

{{/* A parent's are names, or maps with a name. */}}
{{- define "isthmus.pullSecrets" -}}
{{- $names := list -}}
{{- range concat ((.Values.global | default dict).imagePullSecrets | default list) (.Values.imagePullSecrets | default list) -}}
{{- if kindIs "string" . -}}
{{- $names = append $names . -}}
{{- else -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- with uniq $names }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* On OpenShift the namespace says which users and groups a pod may have. */}}
{{- define "isthmus.openShift" -}}
{{- if or (eq .Values.platform "OpenShift") (and (eq .Values.platform "Auto") (.Capabilities.APIVersions.Has "security.openshift.io/v1")) -}}
true
{{- end -}}
{{- end -}}

{{/* The file of the operator's --job-defaults, as JSON; empty where it would say nothing. Left to the namespace are, on OpenShift,
what the admin has not set. */}}
{{- define "isthmus.jobDefaults" -}}
{{- $made := dict -}}
{{- range $key, $value := .Values.jobDefaults -}}
{{- if $value -}}
{{- $_ := set $made $key (deepCopy $value) -}}
{{- end -}}
{{- end -}}
{{- if include "isthmus.openShift" . -}}
{{- $all := $made.all | default dict -}}
{{- $spec := $all.spec | default dict -}}
{{- $unset := dict "runAsUser" nil "runAsGroup" nil "fsGroup" nil -}}
{{- range $key, $value := $spec.securityContext -}}
{{- $_ := set $unset $key $value -}}
{{- end -}}
{{- $_ := set $spec "securityContext" $unset -}}
{{- $_ := set $all "spec" $spec -}}
{{- $_ := set $made "all" $all -}}
{{- end -}}
{{- if $made -}}
{{- toJson $made -}}
{{- end -}}
{{- end -}}

{{- define "isthmus.podSecurityContext" -}}
{{- $context := .Values.podSecurityContext | default dict -}}
{{- if include "isthmus.openShift" . -}}
{{- $context = omit $context "fsGroup" "runAsUser" "runAsGroup" -}}
{{- end -}}
{{- with $context }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "isthmus.gatewaySecret" -}}
{{- if eq .Values.gateway.certificates "Secret" -}}
{{- required "gateway.secretName must name the Secret with the gateway's certificate" .Values.gateway.secretName -}}
{{- else -}}
{{- include "isthmus.operator" . }}-gateway
{{- end -}}
{{- end -}}

{{/* Rules of the operator in a served namespace: docs/operating/operator/install.md says what each is for. */}}
{{- define "isthmus.servedRules" -}}
- apiGroups: [isthmus.dev]
  resources: [federatedjobs]
  verbs: [get, list, watch, patch, delete]
- apiGroups: [isthmus.dev]
  resources: [federatedjobs/status]
  verbs: [patch]
- apiGroups: [isthmus.dev]
  resources: [federatedjobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [services, configmaps, secrets, persistentvolumeclaims]
  verbs: [get, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{/* Rules of the operator outside of namespaces. */}}
{{- define "isthmus.clusterRules" -}}
{{- if .Values.sites.enabled -}}
- apiGroups: [isthmus.dev]
  resources: [hpcsites]
  verbs: [get, list, watch, patch]
- apiGroups: [isthmus.dev]
  resources: [hpcsites/status]
  verbs: [patch]
{{- /* A namespace that is deleted takes its Roles first, and its jobs wait for their pools at sites to be cancelled. */ -}}
{{- if eq .Values.scope.type "Namespaces" }}
- apiGroups: [isthmus.dev]
  resources: [federatedjobs]
  verbs: [get, list, watch, patch]
- apiGroups: [isthmus.dev]
  resources: [federatedjobs/status]
  verbs: [patch]
{{- end }}
{{- if not .Values.operator.cluster }}
- apiGroups: [""]
  resources: [namespaces]
  resourceNames: [kube-system]
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
{{- end -}}
{{- end -}}

{{/* Of a Service. An empty line where nothing is set. */}}
{{- define "isthmus.families" -}}
{{- with .ipFamilyPolicy -}}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .ipFamilies }}
ipFamilies:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What a monitor and a ScrapeConfig have in common. */}}
{{- define "isthmus.scrape" -}}
{{- with .scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
{{- with .relabelings }}
{{ ternary "relabelConfigs" "relabelings" (hasKey $ "targets") }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .metricRelabelings }}
{{ ternary "metricRelabelConfigs" "metricRelabelings" (hasKey $ "targets") }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "isthmus.subjects" -}}
- kind: ServiceAccount
  name: {{ include "isthmus.serviceAccount" . | quote }}
  namespace: {{ .Release.Namespace | quote }}
{{- end -}}
