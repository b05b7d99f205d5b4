package config

import (
	"maps"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/platforms"
)

// The sandboxers: podSandboxer has a process hold the pod's namespaces, with
// shimSandboxer the shim does what there is to do.
const (
	podSandboxer  = "podsandbox"
	shimSandboxer = "shim"
)

// reservedAnnotations begins the annotations that every specification carries.
const reservedAnnotations = "io.kubernetes.cri."

// Runtime is the configuration of everything that runs pods.
type Runtime struct {
	// DefaultHandler is the name of the handler for pods that name none. It is
	// in Handlers.
	DefaultHandler string
	Handlers       map[string]Handler
	CNI            CNI

	IgnoreBlockIONotEnabledErrors bool
	IgnoreRDTNotEnabledErrors     bool

	EnableSELinux        bool
	SELinuxCategoryRange int
	// HostNetworkDisableSELinux leaves pods with the host's network without
	// a label.
	HostNetworkDisableSELinux bool
	DisableAppArmor           bool
	// UnsetSeccompProfile is "" or "unconfined", "runtime/default",
	// "docker/default", or "localhost/" and an absolute path.
	UnsetSeccompProfile string
	RestrictOOMScoreAdj bool
	DisableProcMount    bool

	TolerateMissingHugetlbController bool
	DisableHugetlbController         bool

	DeviceOwnershipFromSecurityContext bool
	IgnoreImageDefinedVolumes          bool
	CDISpecDirs                        []string
	// HooksDirs are directories with OCI hooks; a later one wins.
	HooksDirs []string

	NetNSMountsUnderStateDir bool
	// NamespacesDir is where namespaces are to be found, "" for nowhere.
	NamespacesDir           string
	EnableUnprivilegedPorts bool
	EnableUnprivilegedICMP  bool
	// DefaultSysctls are kernel settings by dotted name, with the value of the last
	// entry that names one.
	DefaultSysctls map[string]string

	// MaxLogLine is the length in bytes at which a log line is split, 0 for
	// none.
	MaxLogLine int
	// MaxLogSize is how long a log may get in bytes, 0 for no limit.
	MaxLogSize int64
	// DrainExecSyncIOTimeout bounds the wait for the end of output after the
	// process of an ExecSync exited. 0 is no bound, which only an explicit
	// "0s" gives.
	DrainExecSyncIOTimeout time.Duration

	// Containers is what every container gets, unless something nearer to it
	// says otherwise.
	Containers Containers
	// Workloads are by name.
	Workloads []Workload

	IgnoreDeprecationWarnings []string
	StatsCollectPeriod        time.Duration
	StatsRetentionPeriod      time.Duration
	EnableCRIU                bool
}

// Handler is a runtime handler as configured.
type Handler struct {
	Name string
	// RuntimeType is containerd's name of the runtime.
	RuntimeType string
	// RuntimePath is the absolute path of the shim, "" to find it by type.
	RuntimePath string
	// Options are the runtime's options, nil if there is no table of them. For
	// runc's type they are known keys only, spelled as in Keys.
	Options map[string]any
	// PlatformRuntimePaths are paths of the OCI runtime by the platform of the
	// image, as "linux/arm64".
	PlatformRuntimePaths map[string]string
	// Sandboxer is "podsandbox", "shim", or the ID of a controller. Not empty.
	Sandboxer string
	// Snapshotter is "" for the images table's.
	Snapshotter string
	// BaseRuntimeSpec is an absolute path or "".
	BaseRuntimeSpec string
	// SeccompProfile is an absolute path, "" for that of Containers.
	SeccompProfile string

	PodAnnotations       []string
	ContainerAnnotations []string
	DefaultAnnotations   map[string]string
	// AllowedAnnotations are those of Allowable that have an effect.
	AllowedAnnotations []string

	// ContainerCreateTimeout is 0 for the usual time.
	ContainerCreateTimeout time.Duration

	// CNIConfDir is "" for CNI.ConfDir; CNIMaxConfNum goes with it.
	CNIConfDir    string
	CNIMaxConfNum int

	PrivilegedWithoutHostDevices                  bool
	PrivilegedWithoutHostDevicesAllDevicesAllowed bool
	CgroupWritable                                bool
	SELinuxKVM                                    bool
	DisablePauseImagePull                         bool
	IOType                                        IOType
	// Implied says that neither the configuration nor the default asks for the
	// handler: its shim need not be installed.
	Implied bool
}

// IsRunc reports whether Options are those of runc, as our own shim has them too.
func (h Handler) IsRunc() bool { return CallsRunc(h.RuntimeType) }

// CallsRunc reports whether the shim of a runtime_type calls runc, or another OCI runtime
// with runc's verbs.
func CallsRunc(runtimeType string) bool {
	return runtimeType == runcType || runtimeType == gantryType || runtimeType == gantryPodType
}

// RuncUpdates reports whether the shim of a runtime_type has the OCI runtime set limits:
// our own does that itself.
func RuncUpdates(runtimeType string) bool { return runtimeType == runcType }

// ShimPerPod reports whether a runtime_type takes the options of runc and has a shim
// for each pod.
func ShimPerPod(runtimeType string) bool {
	return runtimeType == runcType || runtimeType == gantryPodType
}

// isKata reports whether the runtime is one of Kata Containers' by its type, or
// where only a path is configured by its program: their pods are virtual machines.
func (h Handler) isKata() bool {
	if h.RuntimeType == "" {
		return strings.HasPrefix(filepath.Base(h.RuntimePath), "containerd-shim-kata")
	}
	return strings.HasPrefix(h.RuntimeType, "io.containerd.kata")
}

// IOType is how the output of containers travels.
type IOType string

// The ways of output.
const (
	IOFIFO      IOType = "fifo"
	IOStreaming IOType = "streaming"
)

// CNI is how pods are attached to networks.
type CNI struct {
	BinDirs []string
	ConfDir string
	// MaxConfNum is 0 for all configurations.
	MaxConfNum    int
	SetupSerially bool
	// ConfTemplate is an absolute path or "".
	ConfTemplate        string
	IPPreference        IPPreference
	UseInternalLoopback bool
	// DefaultNetwork is "" for the first by file name.
	DefaultNetwork string
	// ReadyTimeout is 0 for no waiting.
	ReadyTimeout time.Duration
	StatusGrace  time.Duration
	CheckOnStart bool
	HostPorts    HostPorts
}

// HostPorts is who makes ports of the node lead to pods.
type HostPorts string

// The ways of host ports.
const (
	HostPortsAuto     HostPorts = "auto"
	HostPortsCNI      HostPorts = "cni"
	HostPortsNative   HostPorts = "native"
	HostPortsNFTables HostPorts = "nftables"
	HostPortsIPTables HostPorts = "iptables"
	HostPortsOff      HostPorts = "off"
)

// IPPreference is which of a pod's addresses comes first.
type IPPreference string

// The preferences.
const (
	PreferIPv4 IPPreference = "ipv4"
	PreferIPv6 IPPreference = "ipv6"
	// PreferCNI keeps the order of the CNI result.
	PreferCNI IPPreference = "cni"
)

// ParseRuntime checks the runtime table and returns its meaning. The error
// joins a KeyError for everything that is wrong.
func ParseRuntime(raw Raw) (Runtime, []Warning, error) {
	w, v := load(RuntimePlugin, raw)
	w.legacy(v)
	out := runtimeFlags(v)
	out.CNI = w.cni(v.table("cni"))
	out.DefaultSysctls = w.sysctls(v.list("default_sysctls"))
	out.Containers = w.containers(v)
	out.Workloads = w.workloads(v.table("workloads"))
	out.DefaultHandler = v.str("containerd.default_runtime_name")
	out.Handlers = map[string]Handler{}
	runtimes := v.table("containerd.runtimes")
	for _, name := range runtimes.names() {
		out.Handlers[name] = w.handler(name, w.inherited(name, runtimes, out.DefaultHandler))
	}
	out.addOwn()
	for _, key := range []string{"stats_collect_period", "stats_retention_period"} {
		if err := checkDuration(v.str(key)); err != nil {
			w.fail([]string{key}, "%v", err)
		}
	}
	w.checkLogSize(out.MaxLogSize)
	w.checkRuntime(out)
	warnings, err := w.result()
	if err != nil {
		return Runtime{}, warnings, err
	}
	return out, warnings, nil
}

// addOwn adds the handler that runs what the handler runc does in our own shim. A
// configuration that has one of its name keeps it, and one whose handler runc runs
// something else gets one with the defaults. It is there also where another is the
// default, for pods from before that was so.
func (r Runtime) addOwn() {
	if _, ok := r.Handlers[ownHandler]; ok {
		return
	}
	h := r.Handlers[runcHandler]
	if h.RuntimeType != runcType {
		h = Handler{IOType: IOFIFO}
	}
	h.Name, h.RuntimeType, h.RuntimePath, h.Sandboxer = ownHandler, gantryType, "", shimSandboxer
	h.Implied = r.DefaultHandler != ownHandler
	r.Handlers[ownHandler] = h
}

// maxCategories is how many there are in SELinux policies.
const maxCategories = 1024

// runtimeFlags reads the keys that stand for themselves.
func runtimeFlags(v values) Runtime {
	out := Runtime{
		IgnoreBlockIONotEnabledErrors:      v.bool("containerd.ignore_blockio_not_enabled_errors"),
		IgnoreRDTNotEnabledErrors:          v.bool("containerd.ignore_rdt_not_enabled_errors"),
		EnableSELinux:                      v.bool("enable_selinux"),
		SELinuxCategoryRange:               v.int("selinux_category_range"),
		HostNetworkDisableSELinux:          v.bool("hostnetwork_disable_selinux"),
		DisableAppArmor:                    v.bool("disable_apparmor"),
		UnsetSeccompProfile:                v.str("unset_seccomp_profile"),
		RestrictOOMScoreAdj:                v.bool("restrict_oom_score_adj"),
		DisableProcMount:                   v.bool("disable_proc_mount"),
		TolerateMissingHugetlbController:   v.bool("tolerate_missing_hugetlb_controller"),
		DisableHugetlbController:           v.bool("disable_hugetlb_controller"),
		DeviceOwnershipFromSecurityContext: v.bool("device_ownership_from_security_context"),
		IgnoreImageDefinedVolumes:          v.bool("ignore_image_defined_volumes"),
		CDISpecDirs:                        v.list("cdi_spec_dirs"),
		HooksDirs:                          v.list("hooks_dirs"),
		NetNSMountsUnderStateDir:           v.bool("netns_mounts_under_state_dir"),
		NamespacesDir:                      v.str("namespaces_dir"),
		EnableUnprivilegedPorts:            v.bool("enable_unprivileged_ports"),
		EnableUnprivilegedICMP:             v.bool("enable_unprivileged_icmp"),
		MaxLogLine:                         max(0, v.int("max_container_log_line_size")),
		MaxLogSize:                         int64(max(0, v.int(logSizeMax))),
		DrainExecSyncIOTimeout:             v.duration("drain_exec_sync_io_timeout", defaultDrain),
		IgnoreDeprecationWarnings:          v.list("ignore_deprecation_warnings"),
		StatsCollectPeriod:                 v.duration("stats_collect_period", defaultStatsPeriod),
		StatsRetentionPeriod:               v.duration("stats_retention_period", defaultStatsRetention),
		EnableCRIU:                         v.bool("enable_criu"),
	}
	if out.SELinuxCategoryRange == 0 {
		out.SELinuxCategoryRange = maxCategories
	}
	return out
}

func (w *walker) checkRuntime(r Runtime) {
	if r.DrainExecSyncIOTimeout == 0 {
		w.warn("no limit lets a child that keeps the output open hold a call for ever (CVE-2026-53495); remove the key for the default of "+defaultDrain.String(),
			"drain_exec_sync_io_timeout")
	}
	if _, ok := r.Handlers[r.DefaultHandler]; !ok {
		w.fail([]string{"containerd", "default_runtime_name"}, "%q is not configured under runtimes", r.DefaultHandler)
	}
	w.notNegative(r.SELinuxCategoryRange, "selinux_category_range")
	if r.EnableSELinux && (r.SELinuxCategoryRange == 1 || r.SELinuxCategoryRange > maxCategories) {
		w.fail([]string{"selinux_category_range"}, "%d: a pod has two categories, of %d at most", r.SELinuxCategoryRange, maxCategories)
	}
	for _, dir := range r.CDISpecDirs {
		w.absolute(dir, "cdi_spec_dirs")
	}
	for _, dir := range r.HooksDirs {
		w.absolute(dir, "hooks_dirs")
	}
	w.absolute(r.NamespacesDir, "namespaces_dir")
	profile, local := strings.CutPrefix(r.UnsetSeccompProfile, "localhost/")
	switch {
	case local:
		w.absolute(profile, "unset_seccomp_profile")
	case profile == "", profile == "unconfined", profile == "runtime/default", profile == "docker/default":
	default:
		w.fail([]string{"unset_seccomp_profile"}, "%q is none of \"unconfined\", \"runtime/default\" and \"localhost/\" with a path", profile)
	}
}

// sysctls reads "name=value" entries.
func (w *walker) sysctls(entries []string) map[string]string {
	set := map[string]string{}
	for _, e := range entries {
		name, value, ok := strings.Cut(e, "=")
		if name, value = strings.TrimSpace(name), strings.TrimSpace(value); !ok || name == "" {
			w.fail([]string{"default_sysctls"}, "%q is not of the form \"name=value\"", e)
			continue
		}
		dotted, _, err := Sysctl(name, value)
		if err != nil {
			w.fail([]string{"default_sysctls"}, "%q: %v", e, err)
			continue
		}
		set[dotted] = value
	}
	return set
}

func (w *walker) cni(v values) CNI {
	out := CNI{
		BinDirs:             v.list("bin_dirs"),
		ConfDir:             v.str("conf_dir"),
		MaxConfNum:          v.int("max_conf_num"),
		SetupSerially:       v.bool("setup_serially"),
		ConfTemplate:        v.str("conf_template"),
		IPPreference:        IPPreference(v.str("ip_pref")),
		UseInternalLoopback: v.bool("use_internal_loopback"),
		DefaultNetwork:      v.str("default_network"),
		ReadyTimeout:        v.duration("ready_timeout", 0),
		StatusGrace:         v.duration("status_grace_period", 0),
		CheckOnStart:        v.bool("check_on_start"),
		HostPorts:           HostPorts(v.str("host_ports")),
	}
	for _, dir := range out.BinDirs {
		w.absolute(dir, "cni", "bin_dirs")
	}
	w.absolute(out.ConfDir, "cni", "conf_dir")
	w.absolute(out.ConfTemplate, "cni", "conf_template")
	w.notNegative(out.MaxConfNum, "cni", "max_conf_num")
	switch out.HostPorts {
	case HostPortsAuto, HostPortsCNI, HostPortsNative, HostPortsNFTables, HostPortsIPTables, HostPortsOff:
	default:
		w.fail([]string{"cni", "host_ports"}, "%q is none of \"auto\", \"cni\", \"native\", \"nftables\", \"iptables\" and \"off\"", string(out.HostPorts))
	}
	switch out.IPPreference {
	case "":
		out.IPPreference = PreferIPv4
	case PreferIPv4, PreferIPv6, PreferCNI:
	default:
		w.fail([]string{"cni", "ip_pref"}, "%q is none of \"ipv4\", \"ipv6\" and \"cni\"", string(out.IPPreference))
	}
	return out
}

// inherited is the table of a handler, with what it takes from the default one.
func (w *walker) inherited(name string, runtimes values, def string) values {
	own, from := runtimes.entry(name), runtimes.entry(def)
	if def == ownHandler && len(from) == 0 { // as addOwn makes it
		from = maps.Clone(runtimes.entry(runcHandler))
		from["runtime_type"] = gantryType
		delete(from, "runtime_path")
	}
	if !own.bool("inherit_default_runtime") {
		return own
	}
	at := []string{"containerd", "runtimes", name, "inherit_default_runtime"}
	if name == def {
		w.fail(at, "is set for the default handler itself")
	}
	out := maps.Clone(own)
	for _, key := range []string{"runtime_type", "runtime_path", "options"} {
		if own.str(key) != "" || len(own.table(key)) > 0 {
			w.fail(at, "is set, and so is %s, which it would replace", key)
		}
		delete(out, key)
		if v, ok := from[key]; ok {
			out[key] = v
		}
	}
	return out
}

// platformPaths reads paths by the name of a platform.
func (w *walker) platformPaths(handler string, v values) map[string]string {
	var out map[string]string
	for _, name := range v.names() {
		path, _ := v[name].(string)
		if path == "" {
			continue
		}
		at := []string{"containerd", "runtimes", handler, "platform_runtime_paths", name}
		p, err := platforms.Parse(name)
		if err != nil {
			w.fail(at, "%q is not a platform, write one as \"linux/amd64\"", name)
			continue
		}
		w.absolute(path, at...)
		if out == nil {
			out = map[string]string{}
		}
		out[platforms.FormatAll(platforms.Normalize(p))] = path
	}
	return out
}

func (w *walker) handler(name string, v values) Handler {
	h := Handler{
		Name:                         name,
		RuntimeType:                  v.str("runtime_type"),
		RuntimePath:                  v.str("runtime_path"),
		Options:                      v.table("options"),
		Sandboxer:                    v.str("sandboxer"),
		Snapshotter:                  v.str("snapshotter"),
		BaseRuntimeSpec:              v.str("base_runtime_spec"),
		SeccompProfile:               v.str("seccomp_profile"),
		PodAnnotations:               v.list("pod_annotations"),
		ContainerAnnotations:         v.list("container_annotations"),
		DefaultAnnotations:           w.annotations(name, v.table("default_annotations")),
		PlatformRuntimePaths:         w.platformPaths(name, v.table("platform_runtime_paths")),
		AllowedAnnotations:           v.list("allowed_annotations"),
		ContainerCreateTimeout:       v.duration("container_create_timeout", 0),
		CNIConfDir:                   v.str("cni_conf_dir"),
		CNIMaxConfNum:                v.int("cni_max_conf_num"),
		PrivilegedWithoutHostDevices: v.bool("privileged_without_host_devices"),
		PrivilegedWithoutHostDevicesAllDevicesAllowed: v.bool("privileged_without_host_devices_all_devices_allowed"),
		CgroupWritable:        v.bool("cgroup_writable"),
		DisablePauseImagePull: v.bool("disable_pause_image_pull"),
		IOType:                IOType(v.str("io_type")),
	}
	if h.Sandboxer == "" {
		h.Sandboxer = podSandboxer
	}
	if h.IOType == "" {
		h.IOType = IOFIFO
	}
	var said bool
	if h.SELinuxKVM, said = v["selinux_kvm"].(bool); !said {
		h.SELinuxKVM = h.isKata()
	}
	if h.IsRunc() && h.Options != nil {
		h.Options = w.runcOptions(name, h.Options)
	}
	w.checkHandler(h)
	return h
}

// annotations reads a handler's own annotations, nil for none.
func (w *walker) annotations(handler string, v values) map[string]string {
	var out map[string]string
	for _, key := range v.names() {
		if key == "" || strings.HasPrefix(key, reservedAnnotations) {
			w.fail([]string{"containerd", "runtimes", handler, "default_annotations", key}, "is no annotation to be set: those that begin with %q are given by the CRI service", reservedAnnotations)
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[key], _ = v[key].(string)
	}
	return out
}

func (w *walker) checkHandler(h Handler) {
	at := func(key string) []string { return []string{"containerd", "runtimes", h.Name, key} }
	if h.Name == "" {
		w.fail(at("runtime_type"), "belongs to a handler without a name")
	}
	if h.RuntimeType == "" && h.RuntimePath == "" {
		w.fail(at("runtime_type"), "is empty, name the runtime as %q", runcType)
	}
	if h.PrivilegedWithoutHostDevicesAllDevicesAllowed && !h.PrivilegedWithoutHostDevices {
		w.fail(at("privileged_without_host_devices_all_devices_allowed"), "needs privileged_without_host_devices")
	}
	if h.IOType != IOFIFO && h.IOType != IOStreaming {
		w.fail(at("io_type"), "%q is neither \"fifo\" nor \"streaming\"", string(h.IOType))
	}
	w.absolute(h.RuntimePath, at("runtime_path")...)
	w.absolute(h.BaseRuntimeSpec, at("base_runtime_spec")...)
	w.absolute(h.SeccompProfile, at("seccomp_profile")...)
	w.absolute(h.CNIConfDir, at("cni_conf_dir")...)
	w.notNegative(h.CNIMaxConfNum, at("cni_max_conf_num")...)
	if len(h.PlatformRuntimePaths) > 0 && !h.IsRunc() {
		w.fail(at("platform_runtime_paths"), "needs the runtime_type %q, %q or %q", runcType, gantryType, gantryPodType)
	}
	w.checkAllowed(h)
	w.patterns(h.PodAnnotations, at("pod_annotations"))
	w.patterns(h.ContainerAnnotations, at("container_annotations"))
}

func (w *walker) patterns(list []string, at []string) {
	for _, p := range list {
		if _, err := path.Match(p, ""); err != nil {
			w.fail(at, "%q is not a pattern", p)
		}
	}
}

// runcOptions checks the options of a handler with runc's runtime type.
func (w *walker) runcOptions(name string, raw map[string]any) map[string]any {
	at := []string{"containerd", "runtimes", name, "options"}
	out := w.table(runcOptions, at, raw)
	delete(out, "CriuPath")
	for _, key := range []string{"IoUid", "IoGid", "TaskApiVersion"} {
		if n, _ := out[key].(int64); n < 0 || n > 1<<32-1 {
			w.fail(append(at, key), "%d is not between 0 and 4294967295", n)
		}
	}
	for _, key := range []string{"Root", "CriuImagePath", "CriuWorkPath"} {
		if s, _ := out[key].(string); s != "" && !filepath.IsAbs(s) {
			w.fail(append(at, key), "%q is not an absolute path", s)
		}
	}
	return out
}

const (
	logSizeMax = "log_size_max"
	// leastLogSize has room for some lines at least.
	leastLogSize = 8 << 10
)

func (w *walker) checkLogSize(n int64) {
	if n > 0 && n < leastLogSize {
		w.fail([]string{logSizeMax}, "%d is less than %d", n, leastLogSize)
	}
}
