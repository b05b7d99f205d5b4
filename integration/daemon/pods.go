package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// uids makes pods of one process distinct.
var uids atomic.Int64

// PodConfig is a pod as the kubelet would describe it: own name and uid, a log
// directory, the daemon's cgroup parent, one container per pid namespace. Change
// it as the test needs.
func (in *Instance) PodConfig(name string) *cri.PodSandboxConfig {
	uid := fmt.Sprintf("uid-%d-%d", os.Getpid(), uids.Add(1))
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: uid, Namespace: "test"},
		Hostname:     name,
		LogDirectory: filepath.Join(in.LogDir, name+"-"+uid),
		Labels:       map[string]string{"io.kubernetes.pod.name": name, "io.kubernetes.pod.uid": uid},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: in.CgroupParent,
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			},
		},
	}
}

// PodConfig is that of the Instance, marked as this test's.
func (d *Daemon) PodConfig(name string) *cri.PodSandboxConfig {
	config := d.Instance.PodConfig(name)
	if d.owner != "" {
		config.Labels[ownerLabel] = d.owner
	}
	return config
}

// ContainerConfig is a container of the given image; without a command the
// image's own runs.
func ContainerConfig(name, image string, command ...string) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: image, UserSpecifiedImage: image},
		Command:  command,
		LogPath:  name + ".log",
		Labels:   map[string]string{"io.kubernetes.container.name": name},
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			},
		},
	}
}

// StartPod makes the log directory and runs the pod.
func (in *Instance) StartPod(ctx context.Context, config *cri.PodSandboxConfig, handler string) (string, error) {
	if config.LogDirectory != "" {
		if err := os.MkdirAll(config.LogDirectory, 0o755); err != nil {
			return "", fmt.Errorf("make log directory: %w", err)
		}
	}
	resp, err := in.Runtime().RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return "", fmt.Errorf("run pod %s: %w", config.GetMetadata().GetName(), err)
	}
	return resp.PodSandboxId, nil
}

// StartContainer creates a container in a pod and starts it.
func (in *Instance) StartContainer(ctx context.Context, pod string, podConfig *cri.PodSandboxConfig, config *cri.ContainerConfig) (string, error) {
	made, err := in.Runtime().CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", config.GetMetadata().GetName(), err)
	}
	if _, err := in.Runtime().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		return made.ContainerId, fmt.Errorf("start container %s: %w", config.GetMetadata().GetName(), err)
	}
	return made.ContainerId, nil
}

// RunPod is StartPod with the default handler for a test.
func (d *Daemon) RunPod(config *cri.PodSandboxConfig) string {
	d.t.Helper()
	return d.RunPodWith(config, "")
}

// RunPodWith is RunPod with the named runtime handler.
func (d *Daemon) RunPodWith(config *cri.PodSandboxConfig, handler string) string {
	d.t.Helper()
	id, err := d.StartPod(context.Background(), config, handler)
	if err != nil {
		d.t.Fatalf("%v", err)
	}
	return id
}

// RunContainer is StartContainer for a test.
func (d *Daemon) RunContainer(pod string, podConfig *cri.PodSandboxConfig, config *cri.ContainerConfig) string {
	d.t.Helper()
	id, err := d.StartContainer(context.Background(), pod, podConfig, config)
	if err != nil {
		d.t.Fatalf("%v", err)
	}
	return id
}

// Exec runs a command in a container and returns its output; a command that
// does not end with 0 fails the test.
func (d *Daemon) Exec(container string, command ...string) string {
	d.t.Helper()
	resp, err := d.Runtime().ExecSync(context.Background(), &cri.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: 60})
	if err != nil {
		d.t.Fatalf("exec %s: %v", strings.Join(command, " "), err)
	}
	if resp.ExitCode != 0 {
		d.t.Fatalf("exec %s: exit %d: %s%s", strings.Join(command, " "), resp.ExitCode, resp.Stdout, resp.Stderr)
	}
	return string(resp.Stdout)
}

// RemovePods stops and removes every pod of the daemon.
func (in *Instance) RemovePods(ctx context.Context) error {
	if in.set.noCRI {
		return nil
	}
	pods, err := in.Runtime().ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var errs []error
	for _, p := range pods.Items {
		errs = append(errs, in.RemovePod(ctx, p.Id))
	}
	return errors.Join(errs...)
}

// RemovePod stops and removes one pod.
func (in *Instance) RemovePod(ctx context.Context, id string) error {
	if _, err := in.Runtime().StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stop pod %s: %w", id, err)
	}
	if _, err := in.Runtime().RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove pod %s: %w", id, err)
	}
	return nil
}
