package spec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
)

// usualPeriod is the kernel's for CPU time, in microseconds.
const usualPeriod = 100_000

// workloadOf is the workload that the pod is one of.
func (h Handler) workloadOf(pod *cri.PodSandboxConfig) (config.Workload, bool) {
	i := slices.IndexFunc(h.Workloads, func(w config.Workload) bool {
		_, ok := pod.GetAnnotations()[w.ActivationAnnotation]
		return ok
	})
	if i < 0 {
		return config.Workload{}, false
	}
	return h.Workloads[i], true
}

// workloadResources are the CPU settings of a container in place of those of its
// request, nil for none.
func workloadResources(in *ContainerInput) (*cri.LinuxContainerResources, error) {
	w, ok := in.Handler.workloadOf(in.Pod)
	if !ok {
		return nil, nil
	}
	r := w.Resources
	if name := w.AnnotationPrefix + "/" + in.Config.GetMetadata().GetName(); w.AnnotationPrefix != "" {
		if value, ok := in.Pod.GetAnnotations()[name]; ok {
			if err := changeResources(&r, value); err != nil {
				return nil, fmt.Errorf("annotation %s: %w", name, err)
			}
		}
	}
	out := &cri.LinuxContainerResources{CpuShares: r.CPUShares, CpuQuota: r.CPUQuota, CpuPeriod: r.CPUPeriod, CpusetCpus: r.CPUSet}
	if r.CPULimit > 0 {
		if out.CpuPeriod == 0 {
			out.CpuPeriod = usualPeriod
		}
		out.CpuQuota = r.CPULimit * out.CpuPeriod / 1000
	}
	return out, nil
}

// maxCPUValue bounds what an annotation may say, far above what a kernel takes.
const maxCPUValue = 1 << 31

// changeResources lays a pod's own values over a workload's.
func changeResources(r *config.WorkloadResources, value string) error {
	d := json.NewDecoder(bytes.NewReader([]byte(value)))
	d.DisallowUnknownFields()
	if err := d.Decode(r); err != nil {
		return fmt.Errorf("%.64q: %w (%w)", value, err, errdefs.ErrInvalidArgument)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("%.64q has more than one value: %w", value, errdefs.ErrInvalidArgument)
	}
	for _, n := range []int64{r.CPUShares, r.CPUQuota, r.CPUPeriod, r.CPULimit} {
		if n < 0 || n > maxCPUValue {
			return fmt.Errorf("%.64q: %d is not possible: %w", value, n, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
