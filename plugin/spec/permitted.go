package spec

import (
	"fmt"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
)

// A pod's annotations are written by whoever writes the pod. What is in this
// file comes from them, where the handler allows it.

// permitted returns the first of the annotations that the pod has and the
// handler or the pod's workload allows, and its value.
func (h Handler) permitted(pod *cri.PodSandboxConfig, names ...string) (name, value string, ok bool) {
	return h.permittedIn(pod.GetAnnotations(), pod, names...)
}

// permittedIn is permitted for annotations of the pod or of one of its containers.
func (h Handler) permittedIn(annotations map[string]string, pod *cri.PodSandboxConfig, names ...string) (name, value string, ok bool) {
	w, _ := h.workloadOf(pod)
	for _, name := range names {
		if value, ok := annotations[name]; ok && (slices.Contains(h.AllowedAnnotations, name) || slices.Contains(w.AllowedAnnotations, name)) {
			return name, value, true
		}
	}
	return "", "", false
}

func badAnnotation(name, value, want string) error {
	return fmt.Errorf("annotation %s: %.64q is not %s: %w", name, value, want, errdefs.ErrInvalidArgument)
}

// umask is what the pod wants for its containers, nil for the runtime's.
func umask(pod *cri.PodSandboxConfig, h Handler) (*uint32, error) {
	name, value, ok := h.permitted(pod, config.AnnotationUmask, config.AnnotationUmaskOld)
	if !ok {
		return nil, nil
	}
	n, err := strconv.ParseUint(value, 8, 32)
	if err != nil || n > 0o777 {
		return nil, badAnnotation(name, value, "an octal number up to 777")
	}
	return new(uint32(n)), nil
}

// ShmSize is how large the pod wants its /dev/shm, in bytes, 0 for the usual
// size.
func ShmSize(pod *cri.PodSandboxConfig, h Handler) (int64, error) {
	name, value, ok := h.permitted(pod, config.AnnotationShmSize, config.AnnotationShmSizeOld)
	if !ok {
		return 0, nil
	}
	n, err := parseSize(value)
	if err != nil {
		return 0, badAnnotation(name, value, "a size as 128Mi")
	}
	return n, nil
}

// sizeUnits are the units of a size, in the spelling of Kubernetes.
var sizeUnits = map[string]int64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}

// parseSize reads a size of one byte at least.
func parseSize(text string) (int64, error) {
	digits := strings.TrimRight(text, "kKMGTi")
	unit, ok := sizeUnits[text[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n <= 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("%.64q is no size: %w", text, errdefs.ErrInvalidArgument)
	}
	return n * unit, nil
}

// maxPodDevices bounds the devices of one annotation.
const maxPodDevices = 64

// PodDevices are the devices that the pod wants for its containers, each of
// which the node must allow.
func PodDevices(pod *cri.PodSandboxConfig, h Handler, p Policy) (list []*cri.Device, err error) {
	name, value, ok := h.permitted(pod, config.AnnotationDevices, config.AnnotationDevicesOld)
	if !ok {
		return nil, nil
	}
	for text := range strings.SplitSeq(value, ",") {
		d, err := config.ParseDevice(strings.TrimSpace(text))
		if err != nil || len(list) == maxPodDevices {
			return nil, badAnnotation(name, text, fmt.Sprintf("one of at most %d devices as /dev/a:/dev/b:rwm", maxPodDevices))
		}
		if !slices.Contains(p.AllowedDevices, path.Clean(d.Host)) {
			return nil, fmt.Errorf("annotation %s: %s is not in allowed_devices: %w", name, d.Host, errdefs.ErrPermissionDenied)
		}
		list = append(list, &cri.Device{HostPath: d.Host, ContainerPath: d.Container, Permissions: d.Permissions})
	}
	return list, nil
}

// LogsDir is the directory with the logs in a volume.
const LogsDir = "logs"

// LogVolumes are the container's mounts, by their number, of the volume in which
// the pod wants its logs to be: an emptyDir, at the place that the kubelet makes
// for it.
func LogVolumes(pod *cri.PodSandboxConfig, c *cri.ContainerConfig, h Handler) (list []int, err error) {
	name, value, ok := h.permitted(pod, config.AnnotationLinkLogs, config.AnnotationLinkLogsOld)
	if !ok {
		return nil, nil
	}
	if !volumeName.MatchString(value) {
		return nil, badAnnotation(name, value, "the name of a volume")
	}
	end := "/pods/" + pod.GetMetadata().GetUid() + "/volumes/kubernetes.io~empty-dir/" + value
	for i, m := range c.GetMounts() {
		if strings.HasSuffix(path.Clean(m.GetHostPath()), end) {
			list = append(list, i)
		}
	}
	return list, nil
}

// volumeName is what Kubernetes lets a volume be called.
var volumeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

const gomaxprocs = "GOMAXPROCS"

// goProcs is the GOMAXPROCS of a container whose pod shares the node's CPUs with
// others and that has no limit: Go would take all of the node for its own. It is
// 0 for one that is left alone. The quality of service is told by the cgroup's
// name, as nothing else of it reaches a runtime.
func goProcs(in *ContainerInput) int64 {
	floor, r, group := in.Policy.MinGOMAXPROCS, in.Config.GetLinux().GetResources(), in.Pod.GetLinux().GetCgroupParent()
	shares := strings.Contains(group, "burstable") || strings.Contains(group, "besteffort")
	if floor <= 0 || r.GetCpuQuota() > 0 || !shares {
		return 0
	}
	if _, other := in.Handler.workloadOf(in.Pod); other {
		return 0 // what it asks for is not what it gets
	}
	if _, skip, _ := in.Handler.permitted(in.Pod, config.AnnotationNoGOMAXPROCS); skip == "true" {
		return 0
	}
	return max(floor, (r.GetCpuShares()+1023)/1024)
}

// CheckMappings refuses user namespaces below what the node gives to pods that
// do not run as root.
func CheckMappings(pod *cri.PodSandboxConfig, p Policy) error {
	u, sc := podUserns(pod), pod.GetLinux().GetSecurityContext()
	if u == nil || sc.GetRunAsUser().GetValue() == 0 {
		return nil
	}
	for _, m := range []struct {
		field, key string
		least      int64
		list       []*cri.IDMapping
	}{{"uids", "minimum_mappable_uid", p.MinMappableUID, u.GetUids()}, {"gids", "minimum_mappable_gid", p.MinMappableGID, u.GetGids()}} {
		for i, id := range m.list {
			if int64(id.GetHostId()) < m.least {
				return fmt.Errorf("config.linux.security_context.namespace_options.userns_options.%s[%d].host_id: %d is below the %d of %s: %w",
					m.field, i, id.GetHostId(), m.least, m.key, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}
