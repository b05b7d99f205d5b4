package spec

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func podOptions(pod *cri.PodSandboxConfig) *cri.NamespaceOption {
	return pod.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// containerNamespaces lists the namespaces of a container. Network, UTS and
// IPC are the pod's; the process namespace is what the container asks for. A
// kind that is left out is the host's.
func containerNamespaces(in *ContainerInput, base []specs.LinuxNamespace) ([]specs.LinuxNamespace, error) {
	pod, own := podOptions(in.Pod), in.security().GetNamespaceOptions()
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	join := func(kind specs.LinuxNamespaceType, path string) error {
		if path == "" {
			return fmt.Errorf("the pod has no %s namespace to join: %w", kind, errdefs.ErrFailedPrecondition)
		}
		list = append(list, specs.LinuxNamespace{Type: kind, Path: path})
		return nil
	}
	if podUserns(in.Pod) != nil {
		if err := join(specs.UserNamespace, in.Namespaces.User); err != nil {
			return nil, err
		}
	}
	if pod.GetNetwork() == cri.NamespaceMode_POD {
		if err := join(specs.NetworkNamespace, in.Namespaces.Net); err != nil {
			return nil, err
		}
		if err := join(specs.UTSNamespace, in.Namespaces.UTS); err != nil {
			return nil, err
		}
	}
	if pod.GetIpc() == cri.NamespaceMode_POD {
		if err := join(specs.IPCNamespace, in.Namespaces.IPC); err != nil {
			return nil, err
		}
	}
	switch own.GetPid() {
	case cri.NamespaceMode_CONTAINER:
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	case cri.NamespaceMode_TARGET:
		if err := join(specs.PIDNamespace, in.Namespaces.Target); err != nil {
			return nil, err
		}
	case cri.NamespaceMode_POD:
		if pod.GetPid() == cri.NamespaceMode_NODE {
			break // the pod's namespace is the host's
		}
		if err := join(specs.PIDNamespace, in.Namespaces.PID); err != nil {
			return nil, err
		}
	}
	if hasCgroupNamespace(in) {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return append(list, kept(base)...), nil
}

// hasCgroupNamespace: on version 2 an unprivileged container sees its own
// cgroup as the root. Version 1 and privileged containers keep the host's view,
// which software that looks for its cgroup there relies on; but systemd, which
// would make the host's path once more below its own group.
func hasCgroupNamespace(in *ContainerInput) bool {
	return in.Host.Cgroup.V2() && !in.privileged() || hasSystemdGroup(in)
}

// kept returns the namespaces of a base specification that the CRI has no word
// for.
func kept(base []specs.LinuxNamespace) (list []specs.LinuxNamespace) {
	for _, ns := range base {
		if ns.Type == specs.TimeNamespace {
			list = append(list, ns)
		}
	}
	return list
}

// checkPodOptions checks a pod's namespace options. The processes and the IPC
// of the host cannot be shown in a user namespace: the kernel mounts /proc and
// /dev/mqueue only for who is root where they come from.
func checkPodOptions(field string, o *cri.NamespaceOption) error {
	const pod, node = cri.NamespaceMode_POD, cri.NamespaceMode_NODE
	if err := oneOf(field+".network", o.GetNetwork(), pod, node); err != nil {
		return err
	}
	if err := oneOf(field+".ipc", o.GetIpc(), pod, node); err != nil {
		return err
	}
	if err := oneOf(field+".pid", o.GetPid(), pod, node, cri.NamespaceMode_CONTAINER); err != nil {
		return err
	}
	if err := checkUserns(field+".userns_options", o.GetUsernsOptions()); err != nil {
		return err
	}
	if !ownUserns(o.GetUsernsOptions()) {
		return nil
	}
	if err := oneOf(field+".pid with a user namespace", o.GetPid(), pod, cri.NamespaceMode_CONTAINER); err != nil {
		return err
	}
	return oneOf(field+".ipc with a user namespace", o.GetIpc(), pod)
}

// checkContainerOptions checks a container's namespace options against its
// pod's. POD is also what an absent value looks like, so it always means "as
// the pod"; NODE in a pod that has its own would be ignored, hence an error.
func checkContainerOptions(field string, o, pod *cri.NamespaceOption) error {
	const as, node = cri.NamespaceMode_POD, cri.NamespaceMode_NODE
	if err := oneOf(field+".network", o.GetNetwork(), as, pod.GetNetwork()); err != nil {
		return err
	}
	if err := oneOf(field+".ipc", o.GetIpc(), as, pod.GetIpc()); err != nil {
		return err
	}
	if err := oneOf(field+".pid", o.GetPid(), as, node, cri.NamespaceMode_CONTAINER, cri.NamespaceMode_TARGET); err != nil {
		return err
	}
	if (o.GetPid() == cri.NamespaceMode_TARGET) != (o.GetTargetId() != "") {
		return fmt.Errorf("%s.target_id: %q with process namespace %s: %w", field, o.GetTargetId(), o.GetPid(), errdefs.ErrInvalidArgument)
	}
	if err := checkUserns(field+".userns_options", o.GetUsernsOptions()); err != nil {
		return err
	}
	if !sameUserns(o.GetUsernsOptions(), pod.GetUsernsOptions()) {
		return fmt.Errorf("%s.userns_options: not those of the pod: %w", field, errdefs.ErrInvalidArgument)
	}
	if ownUserns(pod.GetUsernsOptions()) && o.GetPid() == node {
		return oneOf(field+".pid with a user namespace", o.GetPid(), as)
	}
	return nil
}

func oneOf(field string, got cri.NamespaceMode, allowed ...cri.NamespaceMode) error {
	for _, a := range allowed {
		if got == a {
			return nil
		}
	}
	return fmt.Errorf("%s: %s is not possible here: %w", field, got, errdefs.ErrInvalidArgument)
}
