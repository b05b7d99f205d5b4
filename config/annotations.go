package config

import (
	"slices"
	"strings"
)

// Annotations by which who writes a pod may ask for more than the API has words
// for. Each has an effect only where a handler allows it.
const (
	// AnnotationImagePlatform names the platform of the images.
	AnnotationImagePlatform = "io.gantry.image.platform"
	// Those below have CRI-O's names, older and newer.
	AnnotationUmask    = "umask.crio.io"
	AnnotationUmaskOld = "io.kubernetes.cri-o.umask"
	// AnnotationShmSize is the size of /dev/shm.
	AnnotationShmSize    = "shm-size.crio.io"
	AnnotationShmSizeOld = "io.kubernetes.cri-o.ShmSize"
	// AnnotationDevices lists devices, separated by commas.
	AnnotationDevices    = "devices.crio.io"
	AnnotationDevicesOld = "io.kubernetes.cri-o.Devices"
	// AnnotationNoGOMAXPROCS set to "true" leaves GOMAXPROCS alone.
	AnnotationNoGOMAXPROCS = "skip-gomaxprocs.crio.io"
	// AnnotationLinkLogs names a volume in which the pod's logs are.
	AnnotationLinkLogs    = "link-logs.crio.io"
	AnnotationLinkLogsOld = "io.kubernetes.cri-o.LinkLogs"
	// AnnotationNotifier has the calls recorded that a seccomp profile denies,
	// and with the value "stop" ends the container for them.
	AnnotationNotifier    = "seccomp-notifier-action.crio.io"
	AnnotationNotifierOld = "io.kubernetes.cri-o.seccompNotifierAction"
)

// allowable are all of them, with what they do.
var allowable = []struct{ name, does string }{
	{AnnotationImagePlatform, "takes the image for that platform, as \"linux/arm64\", out of an index, and no other in its place"},
	{AnnotationDevices, "gives devices of allowed_devices to all containers of the pod, as \"/dev/fuse,/dev/sdc:/dev/xvdc:r\""},
	{AnnotationDevicesOld, "is the same by its older name"},
	{AnnotationShmSize, "is the size of the pod's /dev/shm, as \"128Mi\""},
	{AnnotationShmSizeOld, "is the same by its older name"},
	{AnnotationUmask, "is the umask of the pod's containers, as \"077\""},
	{AnnotationUmaskOld, "is the same by its older name"},
	{AnnotationNoGOMAXPROCS, "set to \"true\" keeps min_injected_gomaxprocs away from the pod"},
	{AnnotationLinkLogs, "names an emptyDir volume, in whose directory \"logs\" the containers that mount it find the pod's logs"},
	{AnnotationLinkLogsOld, "is the same by its older name"},
	{AnnotationNotifier, "has the system calls counted that a container's seccomp profile denies, and set to \"stop\" ends the container some seconds after the last of them"},
	{AnnotationNotifierOld, "is the same by its older name"},
}

// Allowable returns the names of the annotations that can be allowed.
func Allowable() (names []string) {
	for _, a := range allowable {
		names = append(names, a.name)
	}
	return names
}

// allowedDoc is the documentation of allowed_annotations.
func allowedDoc() string {
	var list []string
	for _, a := range allowable {
		list = append(list, "\""+a.name+"\" "+a.does)
	}
	return "gantry's own. Annotations by which a pod may ask for more than the API has words for, and which have no effect unless they are listed: " + strings.Join(list, "; ") + "."
}

func (w *walker) checkAllowed(h Handler) {
	for _, name := range h.AllowedAnnotations {
		if !slices.Contains(Allowable(), name) {
			w.fail([]string{"containerd", "runtimes", h.Name, "allowed_annotations"}, "%q is none of %q", name, Allowable())
		}
	}
}
