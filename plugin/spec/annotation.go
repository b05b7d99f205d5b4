package spec

import (
	"path"
	"strconv"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The annotations every specification carries. Shims group containers by them
// and virtual machine runtimes read the pod's size, so the keys are those that
// all of them know.
const (
	AnnotationContainerType    = "io.kubernetes.cri.container-type"
	AnnotationSandboxID        = "io.kubernetes.cri.sandbox-id"
	AnnotationSandboxName      = "io.kubernetes.cri.sandbox-name"
	AnnotationSandboxNamespace = "io.kubernetes.cri.sandbox-namespace"
	AnnotationSandboxUID       = "io.kubernetes.cri.sandbox-uid"
	AnnotationSandboxLogDir    = "io.kubernetes.cri.sandbox-log-directory"
	AnnotationSandboxImage     = "io.kubernetes.cri.podsandbox.image-name"
	AnnotationSandboxCPUPeriod = "io.kubernetes.cri.sandbox-cpu-period"
	AnnotationSandboxCPUQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	AnnotationSandboxCPUShares = "io.kubernetes.cri.sandbox-cpu-shares"
	AnnotationSandboxMemory    = "io.kubernetes.cri.sandbox-memory"
	AnnotationContainerName    = "io.kubernetes.cri.container-name"
	AnnotationImageName        = "io.kubernetes.cri.image-name"

	// ownPrefix begins all of them.
	ownPrefix = "io.kubernetes.cri."

	// TypeContainer and TypeSandbox are the values of AnnotationContainerType.
	TypeContainer = "container"
	TypeSandbox   = "sandbox"
)

// containerAnnotations adds to the base's annotations the handler's, those of
// the request that the handler's configuration lists, and ours, which nothing
// overrides.
// No other annotation reaches a runtime: some act on them.
func containerAnnotations(in *ContainerInput, base map[string]string) map[string]string {
	a := sandboxAnnotations(in.SandboxID, in.Pod, base, in.Handler)
	passThrough(a, in.Config.GetAnnotations(), in.Handler.ContainerAnnotations)
	a[AnnotationContainerType] = TypeContainer
	a[AnnotationContainerName] = in.Config.GetMetadata().GetName()
	// The kubelet asks for an image by its ID, and tells here what it was
	// asked for itself.
	a[AnnotationImageName] = in.Config.GetImage().GetUserSpecifiedImage()
	if a[AnnotationImageName] == "" {
		a[AnnotationImageName] = in.ImageName
	}
	return a
}

func pauseAnnotations(in *PauseInput, base map[string]string) map[string]string {
	a := sandboxAnnotations(in.ID, in.Config, base, in.Handler)
	a[AnnotationContainerType] = TypeSandbox
	a[AnnotationSandboxLogDir] = in.Config.GetLogDirectory()
	if in.ImageName != "" {
		a[AnnotationSandboxImage] = in.ImageName
	}
	if r := in.Config.GetLinux().GetResources(); r != nil {
		a[AnnotationSandboxCPUPeriod] = strconv.FormatInt(r.GetCpuPeriod(), 10)
		a[AnnotationSandboxCPUQuota] = strconv.FormatInt(r.GetCpuQuota(), 10)
		a[AnnotationSandboxCPUShares] = strconv.FormatInt(r.GetCpuShares(), 10)
		a[AnnotationSandboxMemory] = strconv.FormatInt(r.GetMemoryLimitInBytes(), 10)
	}
	return a
}

func sandboxAnnotations(id string, pod *cri.PodSandboxConfig, base map[string]string, h Handler) map[string]string {
	a := map[string]string{}
	for _, from := range []map[string]string{base, h.DefaultAnnotations} {
		for k, v := range from {
			if !strings.HasPrefix(k, ownPrefix) {
				a[k] = v
			}
		}
	}
	passThrough(a, pod.GetAnnotations(), h.PodAnnotations)
	m := pod.GetMetadata()
	a[AnnotationSandboxID] = id
	a[AnnotationSandboxName] = m.GetName()
	a[AnnotationSandboxNamespace] = m.GetNamespace()
	a[AnnotationSandboxUID] = m.GetUid()
	return a
}

// passThrough copies the annotations whose key matches a pattern. A pattern
// that cannot be parsed matches nothing; our own keys are never taken.
func passThrough(dst, src map[string]string, patterns []string) {
	for k, v := range src {
		if strings.HasPrefix(k, ownPrefix) {
			continue
		}
		for _, p := range patterns {
			if ok, err := path.Match(p, k); ok && err == nil {
				dst[k] = v
			}
		}
	}
}
