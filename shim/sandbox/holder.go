package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/plugin/pause"
)

// holderID names the holder's task.
func holderID(id string) string { return id + "-holder" }

// holderUser is who the holder is, where the user namespace is large enough.
const holderUser = 65535

// makeByHolder has the OCI runtime make the namespaces, with the hostname and the
// settings, and pins them. The holder stays only where it is the first process of
// a namespace that containers share; else it has never run.
func (s *Service) makeByHolder(ctx context.Context, dir string, r *Record) error {
	user := filepath.Join(dir, string(specs.UserNamespace))
	ours := []specs.LinuxNamespaceType{specs.UTSNamespace, specs.IPCNamespace}
	if len(r.Users) > 0 && r.NetNS != "" {
		if err := pinOwner(r.NetNS, user); err != nil {
			return fmt.Errorf("pin user namespace: %w", err)
		}
	} else {
		ours, user = append(ours, specs.UserNamespace), ""
	}
	if err := s.unpackRoot(ctx); err != nil {
		return err
	}
	bundle := filepath.Join(dir, holderDir)
	if err := writeBundle(bundle, r.holderSpec(s.root, user)); err != nil {
		return fmt.Errorf("write bundle of holder: %w", err)
	}
	o, err := typeurl.MarshalAnyToProto(r.Options)
	if err != nil {
		return err
	}
	// Created is enough: the namespaces are made by then.
	got, err := s.tasks.Create(ctx, &task.CreateTaskRequest{ID: holderID(r.ID), Bundle: bundle, Options: o})
	if err != nil {
		return fmt.Errorf("create holder: %w", err)
	}
	if err := r.pinAll(dir, fmt.Sprintf("/proc/%d/ns", got.GetPid()), ours...); err != nil {
		return err
	}
	if !r.SharedPID {
		_, err := s.dropHolder(ctx, dir, *r)
		return err
	}
	if _, err := s.tasks.Start(ctx, &task.StartRequest{ID: holderID(r.ID)}); err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	r.Holder = int(got.GetPid())
	return nil
}

// holderSpec is the specification of the holder, whose program is below root. It
// may do nothing but wait. user is the user namespace, "" if it is to be made.
func (r Record) holderSpec(root, user string) *specs.Spec {
	namespaces := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}
	if len(r.Users) > 0 {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: user})
	}
	if r.NetNS != "" {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: r.NetNS})
	}
	if r.UTS {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.UTSNamespace})
	}
	if r.IPC {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.IPCNamespace})
	}
	id := specs.User{UID: holderUser, GID: holderUser}
	if len(r.Users) > 0 {
		id.UID, id.GID = min(id.UID, r.Users[0].Size-1), min(id.GID, r.Groups[0].Size-1)
	}
	return &specs.Spec{
		// Old runtimes refuse what is newer, and nothing here is.
		Version: "1.0.2",
		Process: &specs.Process{
			Args: []string{pause.Program}, Cwd: "/", User: id, NoNewPrivileges: true, Capabilities: &specs.LinuxCapabilities{},
		},
		Root:     &specs.Root{Path: root, Readonly: true},
		Hostname: r.Hostname,
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "mode=755", "size=64k"}},
		},
		Linux: &specs.Linux{
			Namespaces: namespaces, UIDMappings: r.Users, GIDMappings: r.Groups, Sysctl: r.Sysctls, CgroupsPath: r.cgroupsPath(),
			Resources:   &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}},
			MaskedPaths: []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/proc/scsi"},
			ReadonlyPaths: []string{
				"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
			},
		},
	}
}

func writeBundle(dir string, s *specs.Spec) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600)
}

// unpackRoot makes the root filesystem of holders. A runtime in a user namespace
// has to reach it.
func (s *Service) unpackRoot(ctx context.Context) error {
	done, err := s.unpacking.Take(ctx, struct{}{})
	if err != nil {
		return err
	}
	defer done()
	return pause.Unpack(s.root)
}

// RemoveRoot takes away the root filesystem of holders, if there is one.
func RemoveRoot(root string) error {
	if _, err := os.Stat(root); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	// It may be mounted on itself.
	if err := mount.UnmountAll(root, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", root, err)
	}
	return os.RemoveAll(root)
}
