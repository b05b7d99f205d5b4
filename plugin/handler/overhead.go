package handler

import (
	"path"
	"strings"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"google.golang.org/protobuf/proto"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Charge returns the handler of a new pod with options that have the pod's shim in a
// control group of the pod, where four things are so: the pod's runtime class has
// memory for it, as its overhead, which the kubelet adds to the limit of the pod; the
// shim is the pod's alone; the pod's cgroup is named by its path, as the kubelet does;
// and the configuration does not say where shims are.
func (hs *Handlers) Charge(sb record.Sandbox) (record.Handler, error) {
	linux := sb.Config.GetLinux()
	if linux.GetOverhead().GetMemoryLimitInBytes() <= 0 || !strings.HasPrefix(linux.GetCgroupParent(), "/") || !config.ShimPerPod(sb.Handler.Runtime) {
		return sb.Handler, nil
	}
	return withOptions(sb.Handler, func(o *runcoptions.Options) {
		if o.ShimCgroup == "" {
			o.ShimCgroup = shimGroup(sb)
		}
	})
}

// ShimGroup is the control group that Charge has put the pod's shim into, "" for none.
func ShimGroup(sb record.Sandbox) string {
	var o runcoptions.Options
	// What cannot be read is not of Charge.
	if err := proto.Unmarshal(sb.Handler.Options, &o); err != nil || o.GetShimCgroup() != shimGroup(sb) {
		return ""
	}
	return o.GetShimCgroup()
}

func shimGroup(sb record.Sandbox) string {
	return path.Join("/", sb.Config.GetLinux().GetCgroupParent(), "gantry-shim-"+sb.ID)
}
