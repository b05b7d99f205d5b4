package plugin

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/cdi"
	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/facts"
	"github.com/gantry-cri/gantry/plugin/handler"
	"github.com/gantry-cri/gantry/plugin/host"
	"github.com/gantry-cri/gantry/plugin/podfiles"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/rootfs"
	"github.com/gantry-cri/gantry/plugin/selinux"
	"github.com/gantry-cri/gantry/plugin/spec"
	"github.com/gantry-cri/gantry/plugin/store"
	"github.com/gantry-cri/gantry/plugin/userns"
)

// generator gathers what a specification depends on and has package spec make
// it. It is container.Specs, and the source of the pause process's
// specification.
type generator struct {
	handlers   *handler.Handlers
	containers *store.Containers
	files      *podfiles.Files
	userns     *userns.Namespaces
	devices    *cdi.Devices
	labels     *selinux.Labels
	hooksDirs  []string
	// notifier is the socket where seccomp filters tell of what they deny.
	notifier  string
	rules     host.MountRules
	host      facts.Host
	policy    spec.Policy
	workloads []config.Workload
	// node is what every container gets.
	node config.Containers
}

// Container implements container.Specs.
func (g *generator) Container(ctx context.Context, req container.SpecRequest) (container.Spec, error) {
	cfg := req.Container.Config
	in := spec.ContainerInput{
		ID: req.Container.ID, SandboxID: req.Sandbox.ID, Pod: req.Sandbox.Config, Config: cfg,
		ImageConfig: req.Image.Config, ImageName: req.Image.Name, Policy: g.policy, Host: g.host,
		Volumes: req.Volumes.Declared, NotifierSocket: g.notifier,
	}
	h, err := g.handler(ctx, req.Container.Handler)
	if err != nil {
		return container.Spec{}, err
	}
	in.Handler = h
	if in.Files, err = g.podFiles(req.Sandbox); err != nil {
		return container.Spec{}, err
	}
	if in.Namespaces, err = g.namespaces(req.Sandbox, cfg); err != nil {
		return container.Spec{}, err
	}
	if in.Mounts, err = host.ResolveMounts(cfg.GetMounts(), req.Volumes.Images, g.rules); err != nil {
		return container.Spec{}, err
	}
	if in.Labels, err = selinux.Container(req.Sandbox.Labels, cfg.GetLinux().GetSecurityContext().GetSelinuxOptions()); err != nil {
		return container.Spec{}, err
	}
	if err := g.nodes(&in); err != nil {
		return container.Spec{}, err
	}
	if in.Files.Timezone, err = zoneOf(g.node); err != nil {
		return container.Spec{}, err
	}
	if in.NodeMounts, err = g.nodeMounts(ctx); err != nil {
		return container.Spec{}, err
	}
	if in.Logs, err = logsOf(req.Sandbox, &in); err != nil {
		return container.Spec{}, err
	}
	if in.SeccompProfile, err = profileOf(cfg.GetLinux().GetSecurityContext(), in.Handler, g.policy); err != nil {
		return container.Spec{}, err
	}
	if in.Hooks, err = g.hooks(); err != nil {
		return container.Spec{}, err
	}
	missing, err := g.lookInside(ctx, req.Rootfs, &in)
	if err != nil {
		return container.Spec{}, err
	}
	if in.Systemd && !spec.SELinuxType(in.Pod, cfg) {
		in.Labels = g.labels.Init(in.Labels)
	}
	if err := g.write(req.Container, missing, &in); err != nil {
		return container.Spec{}, err
	}
	out, err := g.finish(in, cfg)
	if err != nil {
		return container.Spec{}, err
	}
	out.Mounts = withRefs(cfg.GetMounts(), req.Volumes.Refs)
	// Last, as it changes what is the user's.
	return out, selinux.Relabel(in.Labels, relabelled(cfg.GetMounts(), in.Mounts, in.Volumes), in.Pod.GetAnnotations()[trySkipRelabel] == "true")
}

// trySkipRelabel is CRI-O's annotation of a pod with large volumes that have
// their label from before.
const trySkipRelabel = "io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel"

// relabelled are the volumes that are to have the container's label: those for
// which it is asked, by their own paths on the host, and no file of the pod
// that happens to be mounted in the same place; and those that are its own.
func relabelled(asked []*cri.Mount, resolved, own []facts.Mount) (paths []string) {
	for i, m := range asked {
		if m.GetSelinuxRelabel() {
			paths = append(paths, resolved[i].Source)
		}
	}
	for _, m := range own {
		paths = append(paths, m.Source)
	}
	return paths
}

// finish makes the specification and what the record says of it.
func (g *generator) finish(in spec.ContainerInput, cfg *cri.ContainerConfig) (container.Spec, error) {
	s, err := spec.Container(in)
	if err != nil {
		return container.Spec{}, err
	}
	names, err := spec.CDIDevices(cfg)
	if err != nil {
		return container.Spec{}, err
	}
	// What a vendor's description says is the last word, as everywhere.
	if err := g.devices.Inject(s, names); err != nil {
		return container.Spec{}, err
	}
	spec.CleanHooks(s)
	if err := host.NeedAppArmor(s.Process.ApparmorProfile, spec.AppArmorProfile); err != nil {
		return container.Spec{}, err
	}
	signal, err := spec.ContainerSignal(in)
	if err != nil {
		return container.Spec{}, err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return container.Spec{}, fmt.Errorf("encode specification: %w", err)
	}
	return container.Spec{JSON: b, User: userOf(s), StopSignal: signal.Name}, nil
}

// withRefs are the mounts with the digests of those that are images.
func withRefs(mounts []*cri.Mount, refs map[int]string) []*cri.Mount {
	out := slices.Clone(mounts)
	for i, ref := range refs {
		out[i] = proto.Clone(out[i]).(*cri.Mount)
		out[i].Image.ImageRef = ref
	}
	return out
}

// check brings a specification that others have changed back to what this host
// can do.
func (g *generator) check(s *specs.Spec) {
	r := s.Linux.Resources
	if r.Memory != nil && !g.host.Cgroup.SwapAccounting {
		r.Memory.Swap = nil
	}
	if g.policy.DisableHugetlb {
		r.HugepageLimits = nil
	}
	spec.CleanHooks(s)
}

func userOf(s *specs.Spec) *cri.ContainerUser {
	u := &cri.LinuxContainerUser{Uid: int64(s.Process.User.UID), Gid: int64(s.Process.User.GID)}
	for _, g := range s.Process.User.AdditionalGids {
		u.SupplementalGroups = append(u.SupplementalGroups, int64(g))
	}
	return &cri.ContainerUser{Linux: u}
}

// lookInside fills in what only the root filesystem tells, and returns what it
// lacks.
func (g *generator) lookInside(ctx context.Context, layers []mount.Mount, in *spec.ContainerInput) (missing rootfs.Databases, err error) {
	req := rootfs.RequestOf(in.Config.GetLinux().GetSecurityContext(), in.ImageConfig.User)
	err = withMounted(ctx, layers, func(dir string) error {
		root, err := rootfs.Open(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		if program, ok := spec.MayBeSystemd(in.Config, in.ImageConfig); ok {
			in.Systemd = spec.IsSystemd(rootfs.Program(root, program))
		}
		if in.User, err = rootfs.LookupUser(root, req); err != nil || !g.node.PasswdEntries {
			return err
		}
		missing, err = rootfs.WithEntries(root, in.User)
		return err
	})
	return missing, err
}

// write makes the files that the container has instead of the image's.
func (g *generator) write(c record.Container, d rootfs.Databases, in *spec.ContainerInput) (err error) {
	var env []byte
	if g.node.EnvFile {
		env = []byte{}
	}
	for _, f := range []struct {
		name    string
		content []byte
		path    *string
	}{{"passwd", d.Passwd, &in.Files.Passwd}, {"group", d.Group, &in.Files.Group}, {"containerenv", env, &in.Files.Env}} {
		if f.content == nil {
			continue
		}
		if *f.path, err = g.files.WriteContainer(c, f.name, f.content, in.Labels.Mount); err != nil {
			return err
		}
	}
	return nil
}

// handler is the configured handler as package spec needs it.
func (g *generator) handler(ctx context.Context, r record.Handler) (spec.Handler, error) {
	h, err := g.handlers.Resolve(ctx, r.Name)
	if err != nil {
		return spec.Handler{}, err
	}
	return spec.Handler{
		Name: h.Name, IDMapMounts: h.Features.IDMapMounts, SeccompNotify: h.Features.SeccompNotify,
		AllowedAnnotations: h.AllowedAnnotations, Workloads: g.workloads,
		PodAnnotations: h.PodAnnotations, ContainerAnnotations: h.ContainerAnnotations, DefaultAnnotations: h.DefaultAnnotations,
		PrivilegedWithoutHostDevices:                  h.PrivilegedWithoutHostDevices,
		PrivilegedWithoutHostDevicesAllDevicesAllowed: h.PrivilegedWithoutHostDevicesAllDevicesAllowed,
		BaseSpec: h.BaseSpec, SeccompProfile: h.SeccompProfile, CgroupWritable: h.CgroupWritable, RecursiveReadOnly: h.Features.RecursiveReadOnlyMounts,
		OCIVersion: h.Features.OCIVersionMax, SystemdCgroup: h.SystemdCgroup, HostCgroups: config.CallsRunc(h.Runtime),
	}, nil
}

func (g *generator) podFiles(sb record.Sandbox) (spec.Files, error) {
	p := g.files.Paths(sb)
	return spec.Files{Hosts: p.Hosts, Hostname: p.Hostname, ResolvConf: p.ResolvConf, Shm: p.Shm}, nil
}

// userNS is the path of the pod's own user namespace, "" without one.
func (g *generator) userNS(sb record.Sandbox) string {
	if sb.UserNS() == nil {
		return ""
	}
	return g.userns.Path(sb.ID)
}

// namespaces are the pod's as its process holds them, and the target's. A shim
// that runs a pod without one knows those of process 0 for its own.
func (g *generator) namespaces(sb record.Sandbox, cfg *cri.ContainerConfig) (spec.Namespaces, error) {
	pid := sb.Instance.Pid
	n := spec.Namespaces{
		Net: sb.Network.NetNS, User: g.userNS(sb),
		UTS: spec.ProcNamespace(pid, "uts"), IPC: spec.ProcNamespace(pid, "ipc"), PID: spec.ProcNamespace(pid, "pid"),
	}
	if sb.HostNetwork() && sb.UserNS() != nil && sb.Handler.Sandboxer != record.SandboxerPod {
		// A shim finds the pod's by the network's. Without one it makes its own.
		n.User = spec.ProcNamespace(pid, "user")
	}
	opts := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if opts.GetPid() != cri.NamespaceMode_TARGET {
		return n, nil
	}
	target, err := g.containers.Resolve(opts.GetTargetId())
	if err != nil {
		return n, fmt.Errorf("config.linux.security_context.namespace_options.target_id: %w", err)
	}
	if target.SandboxID != sb.ID || target.Phase != record.ContainerRunning {
		return n, fmt.Errorf("config.linux.security_context.namespace_options.target_id: %s is no running container of this pod: %w",
			target.ID, errdefs.ErrFailedPrecondition)
	}
	n.Target = spec.ProcNamespace(target.Pid, "pid")
	return n, nil
}

// nodes finds the devices: the node's for every container first, those of the
// request last, as they win.
func (g *generator) nodes(in *spec.ContainerInput) error {
	for _, d := range g.node.AdditionalDevices {
		found, err := host.ResolveDevice(&cri.Device{HostPath: d.Host, ContainerPath: d.Container, Permissions: d.Permissions})
		if err != nil {
			return fmt.Errorf("additional_devices: %w", err)
		}
		in.Devices = append(in.Devices, found...)
	}
	wanted, err := spec.PodDevices(in.Pod, in.Handler, g.policy)
	if err != nil {
		return err
	}
	for _, d := range wanted {
		found, err := host.ResolveDevice(d)
		if err != nil {
			return fmt.Errorf("annotation for devices: %w", err)
		}
		in.Devices = append(in.Devices, found...)
	}
	asked, err := host.ResolveDevices(in.Config.GetDevices())
	if err != nil {
		return err
	}
	in.Devices = append(in.Devices, asked...)
	if in.Config.GetLinux().GetSecurityContext().GetPrivileged() && !in.Handler.PrivilegedWithoutHostDevices {
		in.HostDevices, err = host.HostDevices()
	}
	return err
}

// prepare finds out once what is the same for every container.
func (g *generator) prepare(n node) (err error) {
	if g.rules, err = mountRules(n, g.node); err != nil {
		return err
	}
	_, err = zoneOf(g.node) // whether there is such a zone
	return err
}

func mountRules(n node, c config.Containers) (host.MountRules, error) {
	r := host.MountRules{Prefix: c.BindMountPrefix, Reject: c.AbsentMountSourcesToReject}
	for _, dir := range []string{n.rootDir, n.stateDir} {
		store, err := filepath.EvalSymlinks(filepath.Dir(dir)) // containerd's
		if err != nil {
			return r, fmt.Errorf("find the store: %w", err)
		}
		r.Store = append(r.Store, store)
	}
	return r, nil
}

// zoneOf is the file of the time zone, "" for none.
func zoneOf(c config.Containers) (string, error) {
	if c.Timezone == "" {
		return "", nil
	}
	return host.ZoneFile(c.Timezone, c.Timezone == config.LocalTimezone)
}

// nodeMounts are those of default_mounts_file whose source is there.
func (g *generator) nodeMounts(ctx context.Context) (list []facts.Mount, err error) {
	file := g.node.DefaultMountsFile
	if file == "" {
		return nil, nil
	}
	content, err := host.ReadMountsFile(file)
	if err != nil {
		return nil, err
	}
	mounts, err := spec.ParseMountsFile(file, content)
	if err != nil {
		return nil, fmt.Errorf("default_mounts_file: %w", err)
	}
	for _, m := range mounts {
		source, found, err := host.ResolveSource(m.GetHostPath())
		if err != nil {
			return nil, fmt.Errorf("default_mounts_file: %w", err)
		}
		if !found {
			log.G(ctx).WithField("path", m.GetHostPath()).Warn("a source in default_mounts_file does not exist and is left out")
			continue
		}
		list = append(list, facts.Mount{Source: source, Destination: m.GetContainerPath(), Readonly: true})
	}
	return list, nil
}

// logsOf are the mounts of the pod's logs in the volume that its annotation names,
// with the owners of the pod's user namespace.
func logsOf(sb record.Sandbox, in *spec.ContainerInput) (list []facts.Mount, err error) {
	volumes, err := spec.LogVolumes(in.Pod, in.Config, in.Handler)
	if err != nil || len(volumes) == 0 {
		return nil, err
	}
	source, found, err := host.ResolveSource(in.Pod.GetLogDirectory())
	if err != nil || !found {
		return nil, fmt.Errorf("logs of the pod: log_directory %.256q is not there: %w", in.Pod.GetLogDirectory(), cmp.Or(err, error(errdefs.ErrFailedPrecondition)))
	}
	for _, i := range volumes {
		// Here, as the runtime cannot make it in a volume that is read-only.
		if err := host.MakeDir(in.Mounts[i].Source, spec.LogsDir); err != nil {
			return nil, fmt.Errorf("logs of the pod: config.mounts[%d]: %w", i, err)
		}
		list = append(list, facts.Mount{
			Source: source, Destination: path.Join(in.Mounts[i].Destination, spec.LogsDir), Readonly: true, Options: []string{"nosuid", "nodev", "noexec"},
			UIDMappings: sb.UserNS().GetUids(), GIDMappings: sb.UserNS().GetGids(),
		})
	}
	return list, nil
}

// hooks reads the hooks directories anew, as their files come and go. One that
// is not understood is an error: it may be there to guard something.
func (g *generator) hooks() ([]spec.Hook, error) {
	files, err := host.ReadHooks(g.hooksDirs)
	if err != nil {
		return nil, err
	}
	var list []spec.Hook
	for _, f := range files {
		h, err := spec.ParseHook(f.Content)
		if err != nil {
			return nil, fmt.Errorf("hooks_dirs: %s: %w", f.Path, err)
		}
		list = append(list, h)
	}
	return list, nil
}

// profileOf reads the file of the seccomp profile that sc is to have, if it is
// in one.
func profileOf(sc spec.SecurityContext, h spec.Handler, p spec.Policy) ([]byte, error) {
	profile, err := spec.Seccomp(sc, h, p)
	if err != nil || profile.Ref == "" {
		return nil, err
	}
	return host.ReadProfile(profile.Ref)
}

// shmSize is what a pod wants for its /dev/shm.
func shmSize(handlers *handler.Handlers, workloads []config.Workload, sb record.Sandbox) (int64, error) {
	h, _ := handlers.Get(sb.Handler.Name) // a run has just found it
	return spec.ShmSize(sb.Config, spec.Handler{AllowedAnnotations: h.AllowedAnnotations, Workloads: workloads})
}

// Update implements container.Specs.
func (g *generator) Update(s *specs.Spec, update *cri.LinuxContainerResources) (*specs.Spec, error) {
	return spec.Update(s, update, g.host, g.policy)
}

// Volumes implements container.Specs.
func (g *generator) Volumes(c *cri.ContainerConfig, image imagespec.ImageConfig) ([]string, error) {
	return spec.DeclaredVolumes(c.GetMounts(), image, g.policy)
}

// Sysctls are all kernel settings of a pod.
func (g *generator) Sysctls(c *cri.PodSandboxConfig) (map[string]string, error) {
	return spec.Sysctls(c, g.policy, g.host)
}

// Pause makes the specification of a sandbox's pause process.
func (g *generator) Pause(sb record.Sandbox, netns string, args []string) (*specs.Spec, error) {
	h, err := g.handler(context.Background(), sb.Handler)
	if err != nil {
		return nil, err
	}
	files, err := g.podFiles(sb)
	if err != nil {
		return nil, err
	}
	policy := g.policy
	policy.PrivilegedSeccompProfile = "" // it is the containers'
	profile, err := profileOf(sb.Config.GetLinux().GetSecurityContext(), h, policy)
	if err != nil {
		return nil, err
	}
	s, err := spec.Pause(spec.PauseInput{
		ID: sb.ID, Config: sb.Config, Args: args, Handler: h, Policy: policy, Host: g.host,
		NetNS: netns, UserNS: g.userNS(sb), Files: files, SeccompProfile: profile, Labels: sb.Labels,
	})
	if err != nil {
		return nil, err
	}
	return s, host.NeedAppArmor(s.Process.ApparmorProfile, spec.AppArmorProfile)
}
