package config

import (
	"slices"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/deprecation"
)

// State says what gantry does with a key.
type State int

const (
	// Honoured keys have the effect that their documentation says.
	Honoured State = iota
	// NoMeaning keys choose between things that gantry does not tell apart;
	// whatever they are set to, the result is the same. Note says why.
	NoMeaning
	// Accepted keys are known but have no effect yet. Setting one to anything
	// but its default is warned about. Note says what that leaves undone.
	Accepted
	// Deprecated keys have their effect, and setting them is warned about.
	// Note says what to use instead.
	Deprecated
	// Removed keys belong to older containerd releases. Setting one to
	// anything but its default is warned about. Note says what becomes of it
	// and what to use instead.
	Removed
)

// String returns the state in a word.
func (s State) String() string {
	return [...]string{"honoured", "no meaning", "accepted", "deprecated", "removed"}[s]
}

// Key is what is known about one key of the configuration.
type Key struct {
	// Plugin is the table the key is in.
	Plugin string
	// Path is where, with "*" for a name that the user chooses.
	Path string
	// Default is the value when the key is absent; its type is the key's
	// type: string, bool, int64, []string, time.Duration (written as a
	// string), or a map for a table that is not looked into here.
	Default any
	// State says what is done with the key, Note the reason.
	State State
	Note  string
	// Doc is the documentation, plain text.
	Doc string
	// same are values that mean the same as the default.
	same []any
	// own marks a key that containerd does not have: its CRI drops it.
	own bool
	// deprecation is containerd's ID for a Deprecated key.
	deprecation deprecation.Warning
	// group is the table that is warned about once in place of its keys.
	group string
}

// Keys returns the whole table. The caller owns the slice.
func Keys() []Key { return slices.Clone(keys) }

const (
	pauseImage = "registry.k8s.io/pause:3.10.2"
	runcType   = "io.containerd.runc.v2"
	gantryType = "io.containerd.gantry.v2"
	// gantryPodType is the same with a process for each pod.
	gantryPodType = "io.containerd.gantry-pod.v2"
	// runcHandler is in the default configuration, as in containerd's. ownHandler
	// is there without being named: runcHandler, run by our own shim.
	runcHandler = "runc"
	ownHandler  = "gantry"

	// defaultDrain is how long the output of an exec that has exited is still
	// waited for. containerd's own default is no limit, which lets a process
	// that keeps the output open hold a call, a stream and its memory for
	// ever (CVE-2026-53495).
	defaultDrain = 5 * time.Second

	// defaultNetworkReady bridges the restart of a network's agent. It is far
	// below the time that a kubelet gives a pod's start.
	defaultNetworkReady = 30 * time.Second

	// The defaults that containerd has for an empty string.
	defaultStatsPeriod    = time.Second
	defaultStatsRetention = 2 * time.Minute
)

// defaultCertsDirs is the registry.config_path in force when neither it nor a
// mirror is configured.
const defaultCertsDirs = "/etc/containerd/certs.d:/etc/docker/certs.d"

const (
	handlers = "containerd.runtimes.*."
	options  = handlers + "options."

	workloads = "workloads.*."
)

// keys is the table. To honour a key that was only accepted, change its state.
// The order is that of the printed default configuration.
var keys = slices.Concat(imagesKeys,
	credentialKeys("registry.configs", ".*.auth", deprecation.CRIRegistryConfigs),
	credentialKeys("registry.auths", ".*", deprecation.CRIRegistryAuths),
	runtimeKeys, ownKeys, handlerKeys, optionKeys, serverKeys, nriKeys)

var imagesKeys = []Key{
	{Plugin: ImagesPlugin, Path: "snapshotter", Default: defaults.DefaultSnapshotter,
		Doc: "Snapshotter that images are unpacked into and containers run from, unless the runtime handler names another."},
	{Plugin: ImagesPlugin, Path: "disable_snapshot_annotations", Default: true,
		Doc: "Keep image reference and layer digests from the snapshotter. Remote snapshotters, which fetch layers themselves, need them: set to false for those."},
	{Plugin: ImagesPlugin, Path: "discard_unpacked_layers", Default: false,
		Doc: "Let the compressed layers be garbage collected once they are unpacked."},
	{Plugin: ImagesPlugin, Path: "max_concurrent_downloads", Default: int64(3),
		Doc: "Layers of one image that are fetched at the same time. 0 means no limit."},
	{Plugin: ImagesPlugin, Path: "concurrent_layer_fetch_buffer", Default: int64(0),
		Doc: "Bytes of one layer that may be requested at the same time in parallel chunks. 0 fetches a layer in one request."},
	{Plugin: ImagesPlugin, Path: "image_pull_progress_timeout", Default: 5 * time.Minute,
		Doc: "A pull that has received no byte for this long is cancelled. \"0s\" means never."},
	{Plugin: ImagesPlugin, Path: "image_pull_with_sync_fs", Default: false,
		Doc: "Flush the file system after each layer was unpacked."},
	{Plugin: ImagesPlugin, Path: "stats_collect_period", Default: int64(10),
		Doc: "Seconds between two measurements of the space used by snapshots."},
	{Plugin: ImagesPlugin, Path: "use_local_image_pull", Default: false, State: NoMeaning,
		Note: "there is one way to pull, with the features of both of containerd's",
		Doc:  "Pull in the client instead of the transfer service."},
	{Plugin: ImagesPlugin, Path: "image_decryption.key_model", Default: "node", State: Accepted,
		Note: "encrypted images are left to the stream processors of containerd's configuration",
		Doc:  "Where the keys of encrypted images are: \"node\" for this machine, empty for no decryption."},
	{Plugin: ImagesPlugin, Path: "pinned_images.*", Default: "",
		Doc: "Images, by a name of choice, that the kubelet must not remove. \"sandbox\" is the image of pause containers."},
	{Plugin: ImagesPlugin, Path: "runtime_platforms.*.platform", Default: "",
		Doc: "Platform of the images for this runtime handler, as \"linux/amd64\". Empty means the machine's."},
	{Plugin: ImagesPlugin, Path: "runtime_platforms.*.snapshotter", Default: "",
		Doc: "Snapshotter of the images for this runtime handler. Empty means the one above."},
	{Plugin: ImagesPlugin, Path: "registry.config_path", Default: "",
		Doc: "Directories, separated by colons, with a sub-directory per registry that holds a hosts.toml. Empty means " + defaultCertsDirs + " unless mirrors are configured."},
	{Plugin: ImagesPlugin, Path: "registry.headers.*", Default: []string(nil),
		Doc: "Header lines added to every request to any registry, by header name."},
	{Plugin: ImagesPlugin, Path: "registry.mirrors.*.endpoint", Default: []string(nil), State: Deprecated,
		Note: "use config_path and a hosts.toml for the registry", deprecation: deprecation.CRIRegistryMirrors, group: "registry.mirrors",
		Doc: "URLs to try, in order, in place of the named registry. Not together with config_path."},
	{Plugin: ImagesPlugin, Path: "registry.mirrors.*.rewrite", Default: map[string]any(nil), State: Removed,
		Note: "only k3s knew this key; it is ignored, use the \"override_path\" and \"server\" of a hosts.toml"},
	{Plugin: ImagesPlugin, Path: "registry.configs.*.tls.insecure_skip_verify", Default: false, State: Removed,
		Note: "ignored since containerd 2.0; use config_path and skip_verify in the registry's hosts.toml"},
	{Plugin: ImagesPlugin, Path: "registry.configs.*.tls.ca_file", Default: "", State: Removed,
		Note: "ignored since containerd 2.0; use config_path and ca in the registry's hosts.toml"},
	{Plugin: ImagesPlugin, Path: "registry.configs.*.tls.cert_file", Default: "", State: Removed,
		Note: "ignored since containerd 2.0; use config_path and client in the registry's hosts.toml"},
	{Plugin: ImagesPlugin, Path: "registry.configs.*.tls.key_file", Default: "", State: Removed,
		Note: "ignored since containerd 2.0; use config_path and client in the registry's hosts.toml"},
}

// credentialKeys are the keys of the two tables that hold credentials: configs
// by host, auths by URL.
func credentialKeys(group, below string, id deprecation.Warning) []Key {
	key := func(name, doc string) Key {
		return Key{Plugin: ImagesPlugin, Path: group + below + "." + name, Default: "", State: Deprecated,
			Note: "use image pull secrets or a kubelet credential provider", Doc: doc, deprecation: id, group: group}
	}
	return []Key{
		key("username", "User name at the registry, for pulls that bring no credentials."),
		key("password", "Password at the registry."),
		key("auth", "\"user:password\" in base64, used when username is empty."),
		key("identitytoken", "Token to be exchanged for an access token at the registry."),
	}
}

var runtimeKeys = []Key{
	{Plugin: RuntimePlugin, Path: "enable_selinux", Default: false,
		Doc: "Give each pod an SELinux label of its own, where the kernel has SELinux and a policy for containers."},
	{Plugin: RuntimePlugin, Path: "selinux_category_range", Default: int64(1024), same: []any{int64(0)},
		Doc: "Upper bound of the categories in SELinux labels. 0 means 1024."},
	{Plugin: RuntimePlugin, Path: "hostnetwork_disable_selinux", Default: false, own: true,
		Doc: "gantry's own, as CRI-O has it. Give the processes of pods with the host's network no SELinux label, unless a type is asked for; so it always is with the host's processes or IPC."},
	{Plugin: RuntimePlugin, Path: "max_container_log_line_size", Default: int64(16 * 1024),
		Doc: "Longer lines are split in the container log, in bytes. 0 or less means no limit."},
	{Plugin: RuntimePlugin, Path: logSizeMax, Default: int64(0), own: true,
		Doc: "gantry's own. Most bytes of a container's log: before it would become longer, an empty file takes its place, and what was in it is gone. It is for nodes where nobody rotates logs. At least 8192; 0 or less means no limit."},
	{Plugin: RuntimePlugin, Path: "disable_apparmor", Default: false,
		Doc: "Apply no AppArmor profile, even where the kernel has AppArmor."},
	{Plugin: RuntimePlugin, Path: "restrict_oom_score_adj", Default: false,
		Doc: "Never ask for an OOM score below the daemon's own, which an unprivileged daemon may not set."},
	{Plugin: RuntimePlugin, Path: "disable_proc_mount", Default: false,
		Doc: "Ignore the masked and read-only paths of /proc that the kubelet sends and use the default ones."},
	{Plugin: RuntimePlugin, Path: "unset_seccomp_profile", Default: "",
		Doc: "Seccomp profile of a container whose request names none: \"\" or \"unconfined\", \"runtime/default\", or \"localhost/\" and the path of a file."},
	{Plugin: RuntimePlugin, Path: "tolerate_missing_hugetlb_controller", Default: true,
		Doc: "Ignore huge page limits where the hugetlb cgroup controller is missing. If false such a container is refused."},
	{Plugin: RuntimePlugin, Path: "disable_hugetlb_controller", Default: true,
		Doc: "Never set huge page limits, even where the hugetlb cgroup controller is there."},
	{Plugin: RuntimePlugin, Path: "device_ownership_from_security_context", Default: false,
		Doc: "Give devices in a container to the container's user and group."},
	{Plugin: RuntimePlugin, Path: "ignore_image_defined_volumes", Default: false,
		Doc: "Make no directories for the volumes that an image declares: what is written there is in the container's writable layer."},
	{Plugin: RuntimePlugin, Path: "netns_mounts_under_state_dir", Default: false,
		Doc: "Keep network namespaces under the plugin's state directory instead of /var/run/netns. Change it only on a node without pods."},
	{Plugin: RuntimePlugin, Path: "namespaces_dir", Default: "", own: true,
		Doc: "gantry's own. Absolute path of a directory in which the namespaces of pods are found under names that end in the pods' IDs, each kind in a directory of its own: netns, ipcns, utsns and userns. Network namespaces are kept there; the others are links to where the pod's shim keeps them, or its pause process. Empty does without, and network namespaces are where netns_mounts_under_state_dir says. Change it only on a node without pods."},
	{Plugin: RuntimePlugin, Path: "default_sysctls", Default: []string{}, own: true,
		Doc: "gantry's own. Kernel settings, as \"name=value\", of every pod that has the namespace they belong to for itself and does not set them."},
	{Plugin: RuntimePlugin, Path: "enable_unprivileged_ports", Default: true,
		Doc: "Let every process of a pod with a network of its own bind ports below 1024."},
	{Plugin: RuntimePlugin, Path: "enable_unprivileged_icmp", Default: true,
		Doc: "Let every process of a pod with a network of its own send ICMP echo requests."},
	{Plugin: RuntimePlugin, Path: "cdi_spec_dirs", Default: []string{"/etc/cdi", "/var/run/cdi"},
		Doc: "Directories with the descriptions of CDI devices; what is in a later one wins. None means that there are no CDI devices."},
	{Plugin: RuntimePlugin, Path: "hooks_dirs", Default: []string{}, own: true,
		Doc: "gantry's own. Directories with files *.json, each with an OCI hook and the containers it is for (schema 1.0.0 or 0.1.0 of oci-hooks). A file in a later directory replaces one of the same name. They are read for every container; one that is not understood lets none be made."},
	{Plugin: RuntimePlugin, Path: "drain_exec_sync_io_timeout", Default: defaultDrain,
		Doc: "How long ExecSync waits for the output to be closed after the process exited, because a child of it may keep the output open. containerd's default is \"0s\", no limit, which lets such a child hold the call for ever."},
	{Plugin: RuntimePlugin, Path: "ignore_deprecation_warnings", Default: []string{},
		Doc: "Deprecation IDs (\"io.containerd.deprecation/…\") that do not count for the runtime condition ContainerdHasNoDeprecationWarnings."},
	{Plugin: RuntimePlugin, Path: "stats_collect_period", Default: "", State: Accepted,
		Note: "CPU use is computed from the readings of two requests", same: []any{"1s"},
		Doc: "Time between two CPU readings for the CPU use per second. Empty means \"1s\"."},
	{Plugin: RuntimePlugin, Path: "stats_retention_period", Default: "", State: Accepted,
		Note: "CPU use is computed from the readings of two requests", same: []any{"2m", "2m0s"},
		Doc: "How long CPU readings are kept. Empty means \"2m\"."},
	{Plugin: RuntimePlugin, Path: "enable_criu", Default: true, State: Accepted,
		Note: "there is no checkpoint or restore to switch off",
		Doc:  "Offer checkpoint and restore of containers."},

	{Plugin: RuntimePlugin, Path: "cni.bin_dirs", Default: []string{"/opt/cni/bin"},
		Doc: "Directories with the CNI plugins' executables."},
	{Plugin: RuntimePlugin, Path: "cni.conf_dir", Default: "/etc/cni/net.d",
		Doc: "Directory with the CNI network configurations. It is watched."},
	{Plugin: RuntimePlugin, Path: "cni.max_conf_num", Default: int64(1),
		Doc: "Network configurations, in the order of their names, that a pod is attached to. 0 means all."},
	{Plugin: RuntimePlugin, Path: "cni.setup_serially", Default: false,
		Doc: "Attach a pod to its networks one after the other."},
	{Plugin: RuntimePlugin, Path: "cni.conf_template", Default: "",
		Doc: "Go template of a CNI configuration that is written to conf_dir once the kubelet says the pod CIDR."},
	{Plugin: RuntimePlugin, Path: "cni.ip_pref", Default: "",
		Doc: "Which of a pod's addresses is the first: \"ipv4\" (also \"\"), \"ipv6\", or \"cni\" for the plugins' order."},
	{Plugin: RuntimePlugin, Path: "cni.use_internal_loopback", Default: false, State: NoMeaning,
		Note: "no plugin is used for it in any case",
		Doc:  "Bring up the loopback interface without the CNI plugin for it."},
	{Plugin: RuntimePlugin, Path: "cni.default_network", Default: "", own: true,
		Doc: "gantry's own. Name of the network, of those in conf_dir, that gives pods their addresses. Empty means the first by file name."},
	{Plugin: RuntimePlugin, Path: "cni.ready_timeout", Default: defaultNetworkReady, own: true,
		Doc: "gantry's own. How long a pod that starts waits for a network that is not ready, because its configuration or a plugin is missing or STATUS fails. \"0s\" means not at all."},
	{Plugin: RuntimePlugin, Path: "cni.status_grace_period", Default: time.Duration(0), own: true,
		Doc: "gantry's own. How long the network of the node counts as ready after STATUS began to fail, for plugins that are being upgraded."},
	{Plugin: RuntimePlugin, Path: "cni.host_ports", Default: string(HostPortsAuto), own: true,
		Doc: "gantry's own. Who makes ports of the node lead to pods that ask for them: \"cni\" for the network's plugins, \"native\" for gantry itself, \"auto\" for the plugins if one has the capability portMappings and else gantry, or \"off\" for nobody. gantry does it with nftables, or with iptables where the kernel has no nftables; \"nftables\" and \"iptables\" are \"native\" with that one."},
	{Plugin: RuntimePlugin, Path: "cni.check_on_start", Default: false, own: true,
		Doc: "gantry's own. After a start of the daemon, ask the plugins (CNI CHECK) whether the network of every pod that runs is as it was made, and log what is not."},

	{Plugin: RuntimePlugin, Path: "containerd.default_runtime_name", Default: ownHandler,
		Doc: "Runtime handler of the pods that name none. \"gantry\" need not be configured: it has the settings of the handler \"runc\", and gantry's own shim (runtime_type \"io.containerd.gantry.v2\", sandboxer \"shim\") in place of containerd's, one process for all pods and none to hold a pod's namespaces."},
	{Plugin: RuntimePlugin, Path: "containerd.ignore_blockio_not_enabled_errors", Default: false, State: Accepted,
		Note: "block I/O classes are not applied",
		Doc:  "Start a container with a block I/O class even if no classes are configured."},
	{Plugin: RuntimePlugin, Path: "containerd.ignore_rdt_not_enabled_errors", Default: false, State: Accepted,
		Note: "RDT classes are not applied",
		Doc:  "Start a container with an RDT class even if no classes are configured."},

	{Plugin: RuntimePlugin, Path: "enable_cdi", Default: true, State: Removed,
		Note: "CDI has had no switch since containerd 2.4; set cdi_spec_dirs = [] for no CDI devices"},
	{Plugin: RuntimePlugin, Path: "systemd_cgroup", Default: false, State: Removed,
		Note: "sets options.SystemdCgroup of io.containerd.runtime.v1.linux handlers, others never had it; use options.SystemdCgroup of each handler"},
	{Plugin: RuntimePlugin, Path: "disable_cgroup", Default: false, State: Removed,
		Note: "ignored since containerd 2.0; delegate a cgroup v2 tree to the daemon"},
	{Plugin: RuntimePlugin, Path: "tolerate_missing_hugepages_controller", Default: true, State: Removed,
		Note: "ignored by every containerd; use tolerate_missing_hugetlb_controller"},
	{Plugin: RuntimePlugin, Path: "cni.bin_dir", Default: "", State: Removed, same: []any{"/opt/cni/bin"},
		Note: "taken as bin_dirs unless that is set; use bin_dirs"},
	{Plugin: RuntimePlugin, Path: "containerd.no_pivot", Default: false, State: Removed,
		Note: "sets options.NoPivotRoot of io.containerd.runtime.v1.linux handlers, others never had it; use options.NoPivotRoot of each handler"},
	// Tables of a handler each, see handlerTables; legacy.go warns of them.
	{Plugin: RuntimePlugin, Path: "containerd.default_runtime", Default: map[string]any(nil), State: Removed,
		Note: "becomes the handler \"default\" and default_runtime_name; name the handler under runtimes and use default_runtime_name"},
	{Plugin: RuntimePlugin, Path: "containerd.untrusted_workload_runtime", Default: map[string]any(nil), State: Removed,
		Note: "becomes the handler \"untrusted\"; use runtimes.untrusted"},
}

// defaultCapabilities are what an ordinary container gets, in kernel order.
var defaultCapabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"NET_BIND_SERVICE", "NET_RAW", "SYS_CHROOT", "MKNOD", "AUDIT_WRITE", "SETFCAP",
}

// ownKeys are ours alone: what containers get on this node unless something
// nearer to them says otherwise.
var ownKeys = []Key{
	{Plugin: RuntimePlugin, Path: "default_capabilities", Default: defaultCapabilities, own: true,
		Doc: "gantry's own. Capabilities of a container, to which a pod adds and from which it drops. A handler's base_runtime_spec goes first."},
	{Plugin: RuntimePlugin, Path: "add_inheritable_capabilities", Default: false, own: true,
		Doc: "gantry's own. Make the capabilities of a container inheritable too, for old images whose programs have inheritable file capabilities. Such a program then gives them to users other than root (CVE-2022-24769)."},
	{Plugin: RuntimePlugin, Path: "default_env", Default: []string{}, own: true,
		Doc: "gantry's own. Environment of every container, as \"NAME=value\". The handler's base_runtime_spec, the image and the pod go first."},
	{Plugin: RuntimePlugin, Path: "default_ulimits", Default: []string{}, own: true,
		Doc: "gantry's own. Resource limits of every container's processes, as \"nofile=1024:4096\" (soft and hard), \"nofile=4096\" (both) or \"memlock=unlimited\". The handler's base_runtime_spec goes first."},
	{Plugin: RuntimePlugin, Path: "seccomp_profile", Default: "", own: true,
		Doc: "gantry's own. File with the seccomp profile, JSON, that stands for the built-in one where a pod asks for the runtime's default. It is read for every container, so that a change counts for the next one."},
	{Plugin: RuntimePlugin, Path: "passwd_entries", Default: true, own: true,
		Doc: "gantry's own. Give a container whose user or group is a number that its image does not know an /etc/passwd and /etc/group with an entry for it, named as the number, so that tools find a name."},
	{Plugin: RuntimePlugin, Path: "pids_limit", Default: int64(0), own: true,
		Doc: "gantry's own. Processes and threads that one container may have. 0 means no limit but the pod's. The handler's base_runtime_spec goes first."},
	{Plugin: RuntimePlugin, Path: "additional_devices", Default: []string{}, own: true,
		Doc: "gantry's own. Devices of every container, as \"/dev/on-the-host:/dev/in-the-container:rwm\"; path in the container and permissions may be left out."},
	{Plugin: RuntimePlugin, Path: "allowed_devices", Default: []string{"/dev/fuse", "/dev/net/tun"}, own: true,
		Doc: "gantry's own. Devices of the host that pods may ask for by annotation, where the handler's allowed_annotations have \"devices.crio.io\" or its older name."},
	{Plugin: RuntimePlugin, Path: "privileged_seccomp_profile", Default: "", own: true,
		Doc: "gantry's own. File with the seccomp profile, JSON, of privileged containers, which have none otherwise."},
	{Plugin: RuntimePlugin, Path: "read_only", Default: false, own: true,
		Doc: "gantry's own. Give containers that are not privileged a read-only root filesystem, with empty filesystems in memory at /run, /tmp and /var/tmp."},
	{Plugin: RuntimePlugin, Path: "absent_mount_sources_to_reject", Default: []string{}, own: true,
		Doc: "gantry's own. Paths on the host that must exist when a container mounts them: it is refused otherwise, where for other paths a directory is made."},
	{Plugin: RuntimePlugin, Path: "bind_mount_prefix", Default: "", own: true,
		Doc: "gantry's own. Where the node's root is for a daemon in a container: what is mounted into containers is looked for below it, and links in it do not lead out."},
	{Plugin: RuntimePlugin, Path: "timezone", Default: "", own: true,
		Doc: "gantry's own. Time zone of containers, mounted as /etc/localtime: \"Local\" for the node's, or a name as \"Europe/Berlin\", which the node must know. Empty leaves it to the image."},
	{Plugin: RuntimePlugin, Path: "default_mounts_file", Default: "", own: true,
		Doc: "gantry's own. File with mounts of every container, one \"/SRC:/DST\" a line, read-only: it is read for every container, and a source that is absent is left out. Empty means none."},
	{Plugin: RuntimePlugin, Path: "containerenv_file", Default: false, own: true,
		Doc: "gantry's own. Give every container an empty /run/.containerenv, by which programs see that they run in one."},
	{Plugin: RuntimePlugin, Path: "minimum_mappable_uid", Default: int64(-1), own: true,
		Doc: "gantry's own. Lowest user of the host that the user namespace of a pod may have mapped that runs as another user than 0. -1 means any."},
	{Plugin: RuntimePlugin, Path: "minimum_mappable_gid", Default: int64(-1), own: true,
		Doc: "gantry's own. As minimum_mappable_uid, for groups."},
	{Plugin: RuntimePlugin, Path: "uid_mappings", Default: "", own: true,
		Doc: "gantry's own. Users of the node, as \"0:FIRST:COUNT\", that the users 0 and up are in all pods but those that have a user namespace of their own, are privileged or share the node's network, processes or IPC. At least 65536, together with gid_mappings. Volumes keep their owners, who are nobody in such a pod unless they are mapped; a handler without user namespaces runs no such pod."},
	{Plugin: RuntimePlugin, Path: "gid_mappings", Default: "", own: true,
		Doc: "gantry's own. As uid_mappings, for groups."},
	{Plugin: RuntimePlugin, Path: "min_injected_gomaxprocs", Default: int64(0), own: true,
		Doc: "gantry's own. Set GOMAXPROCS in containers that have no CPU limit, in pods that are not guaranteed: to the CPUs that they request, rounded up, and no less than this. 0 sets it in none. What the pod or the image sets goes first."},
	{Plugin: RuntimePlugin, Path: workloads + "activation_annotation", Default: "", own: true,
		Doc: "gantry's own. Annotation that makes a pod one of this workload, whatever its value. The first by name that fits counts."},
	{Plugin: RuntimePlugin, Path: workloads + "annotation_prefix", Default: "", own: true,
		Doc: "gantry's own. With it the pod's annotation PREFIX/CONTAINER, as {\"cpushares\": 20}, changes resources for one container. Empty lets pods change nothing."},
	{Plugin: RuntimePlugin, Path: workloads + "allowed_annotations", Default: []string{}, own: true,
		Doc: "gantry's own. As allowed_annotations of a handler, for the pods of this workload."},
	{Plugin: RuntimePlugin, Path: workloads + "resources.cpushares", Default: int64(0), own: true,
		Doc: "gantry's own. CPU shares of each container, in place of those in the request. 0 leaves that alone, here and below."},
	{Plugin: RuntimePlugin, Path: workloads + "resources.cpuquota", Default: int64(0), own: true,
		Doc: "gantry's own. CPU time, in microseconds, in each period."},
	{Plugin: RuntimePlugin, Path: workloads + "resources.cpuperiod", Default: int64(0), own: true,
		Doc: "gantry's own. The period, in microseconds."},
	{Plugin: RuntimePlugin, Path: workloads + "resources.cpuset", Default: "", own: true,
		Doc: "gantry's own. The CPUs, as \"0-1,4\"."},
	{Plugin: RuntimePlugin, Path: workloads + "resources.cpulimit", Default: int64(0), own: true,
		Doc: "gantry's own. CPU time in thousandths of a CPU, in place of cpuquota."},
	{Plugin: RuntimePlugin, Path: "container_min_memory", Default: int64(0), own: true,
		Doc: "gantry's own. A container whose memory limit is lower, in bytes, is refused: the runtime itself would not fit, and be killed half-way. 0 refuses none."},
}

var handlerKeys = []Key{
	{Plugin: RuntimePlugin, Path: handlers + "runtime_type", Default: "",
		Doc: "Runtime in containerd's naming: \"io.containerd.runc.v2\" runs containerd-shim-runc-v2, \"io.containerd.gantry.v2\" our own, which has one supervisor for all pods, and \"io.containerd.gantry-pod.v2\" the same program with a supervisor for each pod."},
	{Plugin: RuntimePlugin, Path: handlers + "runtime_path", Default: "",
		Doc: "Absolute path of the shim's executable, in place of the one found by runtime_type."},
	{Plugin: RuntimePlugin, Path: handlers + "pod_annotations", Default: []string{},
		Doc: "Pod annotations, as path.Match patterns, that are passed to the runtime in pod and container."},
	{Plugin: RuntimePlugin, Path: handlers + "container_annotations", Default: []string{},
		Doc: "Container annotations, as path.Match patterns, that are passed to the runtime."},
	{Plugin: RuntimePlugin, Path: handlers + "allowed_annotations", Default: []string{}, own: true, Doc: allowedDoc()},
	{Plugin: RuntimePlugin, Path: handlers + "container_create_timeout", Default: time.Duration(0), own: true,
		Doc: "gantry's own. How long the runtime may take to create a container or to start a pod; then it is ended and the request fails. \"0s\" means two minutes."},
	{Plugin: RuntimePlugin, Path: handlers + "privileged_without_host_devices", Default: false,
		Doc: "Give privileged containers no devices of the host."},
	{Plugin: RuntimePlugin, Path: handlers + "privileged_without_host_devices_all_devices_allowed", Default: false,
		Doc: "Still let such containers use any device they make. Needs privileged_without_host_devices."},
	{Plugin: RuntimePlugin, Path: handlers + "cgroup_writable", Default: false,
		Doc: "Mount /sys/fs/cgroup writable in containers that are not privileged. Needs cgroup v2."},
	{Plugin: RuntimePlugin, Path: handlers + "selinux_kvm", Default: false, own: true,
		Doc: "gantry's own. This handler's pods are virtual machines: give their processes the SELinux label of those. If it is not set, Kata Containers' runtimes count as such (runtime_type \"io.containerd.kata…\"), as with containerd."},
	{Plugin: RuntimePlugin, Path: handlers + "base_runtime_spec", Default: "",
		Doc: "File with an OCI runtime specification, JSON, that every container's starts from."},
	{Plugin: RuntimePlugin, Path: handlers + "seccomp_profile", Default: "", own: true,
		Doc: "gantry's own. As seccomp_profile above, for this handler's containers."},
	{Plugin: RuntimePlugin, Path: handlers + "cni_conf_dir", Default: "",
		Doc: "Directory with the CNI network configurations of this handler's pods, in place of cni.conf_dir."},
	{Plugin: RuntimePlugin, Path: handlers + "cni_max_conf_num", Default: int64(0),
		Doc: "As cni.max_conf_num, for cni_conf_dir."},
	{Plugin: RuntimePlugin, Path: handlers + "snapshotter", Default: "",
		Doc: "Snapshotter of this handler's containers. Empty means the images table's."},
	{Plugin: RuntimePlugin, Path: handlers + "sandboxer", Default: "", same: []any{podSandboxer},
		Doc: "Who runs the pod: \"podsandbox\" (also \"\"), a pause process; \"shim\", the runtime itself; or the ID of a sandbox controller plugin."},
	{Plugin: RuntimePlugin, Path: handlers + "disable_pause_image_pull", Default: false, State: NoMeaning,
		Note: "no pause image is pulled for any handler",
		Doc:  "Do not pull the pause image for this handler's pods."},
	{Plugin: RuntimePlugin, Path: handlers + "io_type", Default: "", State: Accepted, same: []any{string(IOFIFO)},
		Note: "container output goes through named pipes",
		Doc:  "How container output reaches the daemon: \"fifo\" (also \"\") or \"streaming\"."},
	{Plugin: RuntimePlugin, Path: handlers + "options", Default: map[string]any(nil),
		Doc: "Options of the runtime. For io.containerd.runc.v2 and io.containerd.gantry.v2 those below; every other runtime has its own, usually TypeUrl and ConfigPath, and gets the table as it is if ConfigPath is not set."},
	{Plugin: RuntimePlugin, Path: handlers + "default_annotations.*", Default: "", own: true,
		Doc: "gantry's own. Value of an annotation that is passed to the runtime in pod and container. One of the request that pod_annotations or container_annotations let pass goes before it."},
	{Plugin: RuntimePlugin, Path: handlers + "platform_runtime_paths.*", Default: "", own: true,
		Doc: "gantry's own. Path of the OCI runtime for containers whose image is for a platform, as \"linux/arm64\", in place of options.BinaryName. The runtime_type must be io.containerd.runc.v2 or io.containerd.gantry.v2."},
	{Plugin: RuntimePlugin, Path: handlers + "inherit_default_runtime", Default: false, own: true,
		Doc: "gantry's own. Take runtime_type, runtime_path and options from the default handler, which this one then does not set."},
	{Plugin: RuntimePlugin, Path: handlers + "sandbox_mode", Default: "", State: Removed, same: []any{podSandboxer},
		Note: "taken as sandboxer unless that is set; use sandboxer"},
	{Plugin: RuntimePlugin, Path: handlers + "runtime_engine", Default: "", State: Removed,
		Note: "taken as options.BinaryName of an io.containerd.runtime.v1.linux handler, others never had it; use options.BinaryName"},
	{Plugin: RuntimePlugin, Path: handlers + "runtime_root", Default: "", State: Removed,
		Note: "taken as options.Root of an io.containerd.runtime.v1.linux handler, others never had it; use options.Root"},
}

// optionKeys are the options of runc. They are checked for handlers with the
// runtime type of runc only.
var optionKeys = []Key{
	{Plugin: RuntimePlugin, Path: options + "BinaryName", Default: "",
		Doc: "The OCI runtime, a name in PATH or a path. Empty means \"runc\"."},
	{Plugin: RuntimePlugin, Path: options + "Root", Default: "",
		Doc: "Directory for the OCI runtime's state. Empty means the shim's default."},
	{Plugin: RuntimePlugin, Path: options + "SystemdCgroup", Default: false,
		Doc: "Let systemd manage the cgroups; set it as the kubelet's cgroupDriver is set."},
	{Plugin: RuntimePlugin, Path: options + "NoNewKeyring", Default: false,
		Doc: "Do not give each container a session keyring of its own."},
	{Plugin: RuntimePlugin, Path: options + "NoPivotRoot", Default: false,
		Doc: "Change the root without pivot_root, which does not work from an initial RAM disk."},
	{Plugin: RuntimePlugin, Path: options + "ShimCgroup", Default: "",
		Doc: "Cgroup for the shim itself. Empty leaves it in the daemon's; but a shim of one pod, whose class has memory for that as its overhead, is in a cgroup of the pod."},
	{Plugin: RuntimePlugin, Path: options + "IoUid", Default: int64(0),
		Doc: "User that owns the pipes of a container's standard streams."},
	{Plugin: RuntimePlugin, Path: options + "IoGid", Default: int64(0),
		Doc: "Group that owns the pipes of a container's standard streams."},
	{Plugin: RuntimePlugin, Path: options + "CriuImagePath", Default: "",
		Doc: "Directory for checkpoint images. Empty means the runtime's choice."},
	{Plugin: RuntimePlugin, Path: options + "CriuWorkPath", Default: "",
		Doc: "Directory for CRIU's logs and temporary files. Empty means the runtime's choice."},
	{Plugin: RuntimePlugin, Path: options + "TaskApiAddress", Default: "", State: Deprecated,
		Note: "the address comes with the request to create a task", deprecation: deprecation.RuncOptionsTaskAPIAddress,
		Doc: "Address of the task API."},
	{Plugin: RuntimePlugin, Path: options + "TaskApiVersion", Default: int64(0), State: Deprecated,
		Note: "the version comes with the request to create a task", deprecation: deprecation.RuncOptionsTaskAPIVersion,
		Doc: "Version of the task API."},
	{Plugin: RuntimePlugin, Path: options + "CriuPath", Default: "", State: Removed,
		Note: "ignored since containerd 2.0; put criu into a directory of PATH"},
}

var serverKeys = []Key{
	{Plugin: ServerPlugin, Path: "disable_tcp_service", Default: true,
		Doc: "Do not offer the CRI on containerd's TCP address."},
	{Plugin: ServerPlugin, Path: "stream_server_address", Default: "127.0.0.1",
		Doc: "Address the streams of exec, attach and port-forward are served on. Empty means the node's own address."},
	{Plugin: ServerPlugin, Path: "stream_server_port", Default: "0",
		Doc: "Port of the streams, a number in quotes. \"0\" means any free one."},
	{Plugin: ServerPlugin, Path: "stream_idle_timeout", Default: 4 * time.Hour,
		Doc: "A stream without traffic for this long is closed. \"0s\" means never."},
	{Plugin: ServerPlugin, Path: "enable_tls_streaming", Default: false,
		Doc: "Serve streams with TLS, with the key pair below or a self-signed one."},
	{Plugin: ServerPlugin, Path: "x509_key_pair_streaming.tls_cert_file", Default: "",
		Doc: "Certificate for streams, PEM."},
	{Plugin: ServerPlugin, Path: "x509_key_pair_streaming.tls_key_file", Default: "",
		Doc: "Private key for streams, PEM. Certificate and key are read anew when they change."},
	{Plugin: ServerPlugin, Path: streamCA, Default: "", own: true,
		Doc: "gantry's own. File with authorities, PEM, of which one must vouch for each client of streams. Empty lets any client connect that has a URL. It is read anew when it changes."},
	{Plugin: ServerPlugin, Path: streamVersion, Default: "1.2", own: true,
		Doc: "gantry's own. Oldest version of TLS that clients of streams may speak: \"1.2\" or \"1.3\"."},
	{Plugin: ServerPlugin, Path: streamSuites, Default: []string{}, own: true,
		Doc: "gantry's own. Cipher suites for streams with TLS 1.2, by their names in IANA's registry, as \"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256\". None leaves the choice to the daemon. Those of TLS 1.3 cannot be chosen."},
}

var nriKeys = []Key{
	{Plugin: NRIPlugin, Path: "disable", Default: false,
		Doc: "Have no NRI plugins."},
	{Plugin: NRIPlugin, Path: "socket_path", Default: defaultNRISocket,
		Doc: "Socket on which NRI plugins connect."},
	{Plugin: NRIPlugin, Path: "disable_connections", Default: false,
		Doc: "Let no plugin connect: only those of plugin_path are used."},
	{Plugin: NRIPlugin, Path: "plugin_path", Default: defaultNRIPlugins,
		Doc: "Directory with the plugins to start with the daemon, named \"10-name\": they are asked in the order of their numbers."},
	{Plugin: NRIPlugin, Path: "plugin_config_path", Default: defaultNRIConfigs,
		Doc: "Directory with the settings of those plugins: \"10-name.conf\", or else \"name.conf\"."},
	{Plugin: NRIPlugin, Path: "plugin_registration_timeout", Default: defaultRegistration,
		Doc: "How long a plugin may take to introduce itself."},
	{Plugin: NRIPlugin, Path: "plugin_request_timeout", Default: defaultRequest,
		Doc: "How long a plugin may take for one event. One that takes longer is dropped; all pods wait for it until then."},
	{Plugin: NRIPlugin, Path: "default_validator.enable", Default: false,
		Doc: "Check what plugins do to a container by the rules below, and refuse the container if one is broken."},
	{Plugin: NRIPlugin, Path: "default_validator.reject_oci_hook_adjustment", Default: false,
		Doc: "No plugin may add OCI hooks."},
	{Plugin: NRIPlugin, Path: "default_validator.reject_runtime_default_seccomp_adjustment", Default: false,
		Doc: "No plugin may change the runtime's default seccomp profile."},
	{Plugin: NRIPlugin, Path: "default_validator.reject_unconfined_seccomp_adjustment", Default: false,
		Doc: "No plugin may give a seccomp profile to a container without one."},
	{Plugin: NRIPlugin, Path: "default_validator.reject_custom_seccomp_adjustment", Default: false,
		Doc: "No plugin may change a seccomp profile that comes from a file."},
	{Plugin: NRIPlugin, Path: "default_validator.reject_namespace_adjustment", Default: false,
		Doc: "No plugin may change namespaces."},
	{Plugin: NRIPlugin, Path: "default_validator.reject_sysctl_adjustment", Default: false,
		Doc: "No plugin may set kernel parameters."},
	{Plugin: NRIPlugin, Path: "default_validator.required_plugins", Default: []string{},
		Doc: "Plugins without whose answer no container is made."},
	{Plugin: NRIPlugin, Path: "default_validator.tolerate_missing_plugins_annotation", Default: "",
		Doc: "Annotation by which a pod does without its required plugins, as static pods have to that such a plugin depends on."},
}

// handlerTables are places outside runtimes where older releases had a handler.
var handlerTables = []string{"containerd.default_runtime", "containerd.untrusted_workload_runtime"}

// shown are the entries that the defaults have under a name of choice: the
// handler runc and the pinned pause image. The values differ from the keys'
// defaults where given.
var shown = []struct {
	plugin, pattern, name string
	values                map[string]any
}{
	{ImagesPlugin, "pinned_images.*", "sandbox", map[string]any{"": pauseImage}},
	{RuntimePlugin, "containerd.runtimes.*", runcHandler, map[string]any{
		"runtime_type": runcType, "sandboxer": podSandboxer,
	}},
}
