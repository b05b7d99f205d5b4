package config

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/pkg/deprecation"
	"github.com/pelletier/go-toml/v2"
)

const (
	images = "[plugins.'io.containerd.cri.v1.images']\n"
	rt     = "[plugins.'io.containerd.cri.v1.runtime']\n"
	server = "[plugins.'io.containerd.grpc.v1.cri']\n"
)

func parseText(t *testing.T, text string) (parsed, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if !strings.HasPrefix(text, "version") {
		text = "version = 4\n" + text
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return parseFile(t, path)
}

func TestRefused(t *testing.T) {
	for name, tc := range map[string]struct{ text, key, says string }{
		"misspelled": {images + "snapshoter = 'x'", inImages + "snapshoter", "nearest known one is " + inImages + "snapshotter"},
		"misspelled in a handler": {rt + "containerd.runtimes.kata.runtime_tpye = 'x'",
			inRuntime + "containerd.runtimes.kata.runtime_tpye", inRuntime + "containerd.runtimes.kata.runtime_type"},
		"in the wrong table": {rt + "containerd.snapshotter = 'x'",
			inRuntime + "containerd.snapshotter", inImages + "snapshotter"},
		"below its table":             {images + "config_path = '/x'", inImages + "config_path", inImages + "registry.config_path"},
		"by its old name":             {images + "sandbox_image = 'x'", inImages + "sandbox_image", inImages + "pinned_images.sandbox"},
		"no pattern of pinned images": {images + "pinned_images.base = 'a*b'", inImages + "pinned_images.base", "a star stands"},
		"no pinned image":             {images + "pinned_images.base = 'Not A Ref'", inImages + "pinned_images.base", "names no image"},
		"unknown in an old file": {"version = 2\n" + server + "no_such_key = 1",
			inRuntime + "no_such_key", "nearest known one is"},
		"unknown table": {rt + "cnii.conf_dir = '/x'", inRuntime + "cnii", inRuntime + "cni"},
		"unknown runc option": {rt + "containerd.runtimes.runc.options.systemd_cgroup = true",
			inRuntime + "containerd.runtimes.runc.options.systemd_cgroup", inRuntime + "containerd.runtimes.runc.options.SystemdCgroup"},
		"name to be quoted": {rt + "containerd.runtimes.\"a.b'\".nope = 1",
			inRuntime + "containerd.runtimes.\"a.b'\".nope", "nearest"},

		"string for integer": {images + "max_concurrent_downloads = '3'", inImages + "max_concurrent_downloads", "want an integer, have a string"},
		"integer for string": {server + "stream_server_port = 10010", "plugins.'io.containerd.grpc.v1.cri'.stream_server_port", "want a string, have an integer"},
		"value for table":    {rt + "cni = true", inRuntime + "cni", "want a table, have true or false"},
		"mixed list":         {rt + "cni.bin_dirs = ['/a', 1]", inRuntime + "cni.bin_dirs", "want a list of strings, have a list"},
		"date":               {rt + "cni.conf_dir = 2020-01-01", inRuntime + "cni.conf_dir", "have a date or time"},

		"bad duration":      {images + "image_pull_progress_timeout = '5'", inImages + "image_pull_progress_timeout", "not a duration"},
		"negative duration": {rt + "drain_exec_sync_io_timeout = '-1s'", inRuntime + "drain_exec_sync_io_timeout", "negative"},
		"bad retention":     {rt + "stats_retention_period = 'x'", inRuntime + "stats_retention_period", "write one as"},
		"no snapshotter":    {images + "snapshotter = ''", inImages + "snapshotter", "is empty"},
		"bad platform":      {images + "runtime_platforms.x.platform = 'a/b/c/d/e'", inImages + "runtime_platforms.x.platform", "is not a platform"},
		"mirrors and path": {images + "registry.config_path = '/c'\nregistry.mirrors.'h'.endpoint = ['https://x']",
			inImages + "registry.mirrors", "together with config_path"},
		"mirror without host": {images + "registry.mirrors.'h'.endpoint = ['localhost:5000']", inImages + "registry.mirrors.h.endpoint", "not a URL with a host"},
		"bad credentials":     {images + "registry.configs.'h'.auth.auth = '%'", inImages + "registry.configs.h.auth.auth", "base64"},
		"bad auths":           {images + "registry.auths.'http://%'.username = 'u'", inImages + "registry.auths.'http://%'", "not a URL"},
		"relative certs":      {images + "registry.config_path = '/a:b'", inImages + "registry.config_path", "\"b\" is not an absolute path"},

		"default handler": {rt + "containerd.default_runtime_name = 'kata'", inRuntime + "containerd.default_runtime_name", "\"kata\" is not configured"},
		"no type":         {rt + "containerd.runtimes.x.snapshotter = 's'", inRuntime + "containerd.runtimes.x.runtime_type", "is empty"},
		"no name":         {rt + "containerd.runtimes.''.runtime_type = 's'", inRuntime + "containerd.runtimes.''.runtime_type", "without a name"},
		"relative shim":   {rt + "containerd.runtimes.runc.runtime_path = 'runc'", inRuntime + "containerd.runtimes.runc.runtime_path", "absolute"},
		"relative spec":   {rt + "containerd.runtimes.runc.base_runtime_spec = 's.json'", inRuntime + "containerd.runtimes.runc.base_runtime_spec", "absolute"},
		"bad pattern":     {rt + "containerd.runtimes.runc.pod_annotations = ['[']", inRuntime + "containerd.runtimes.runc.pod_annotations", "not a pattern"},
		"taken annotation": {rt + "containerd.runtimes.runc.default_annotations.'io.kubernetes.cri.sandbox-id' = 'x'",
			inRuntime + "containerd.runtimes.runc.default_annotations.'io.kubernetes.cri.sandbox-id'", "no annotation to be set"},
		"bad create time": {rt + "containerd.runtimes.runc.container_create_timeout = '5'", inRuntime + "containerd.runtimes.runc.container_create_timeout", "not a duration"},
		"bad io":          {rt + "containerd.runtimes.runc.io_type = 'tcp'", inRuntime + "containerd.runtimes.runc.io_type", "neither"},
		"all devices": {rt + "containerd.runtimes.runc.privileged_without_host_devices_all_devices_allowed = true",
			inRuntime + "containerd.runtimes.runc.privileged_without_host_devices_all_devices_allowed", "needs"},
		"negative uid":  {rt + "containerd.runtimes.runc.options.IoUid = -1", inRuntime + "containerd.runtimes.runc.options.IoUid", "-1"},
		"relative root": {rt + "containerd.runtimes.runc.options.Root = 'r'", inRuntime + "containerd.runtimes.runc.options.Root", "absolute"},
		"two untrusted": {rt + "containerd.runtimes.untrusted.runtime_type = 'a'\ncontainerd.untrusted_workload_runtime.runtime_type = 'b'",
			inRuntime + "containerd.untrusted_workload_runtime", "second definition"},
		"bad preference": {rt + "cni.ip_pref = 'ipv5'", inRuntime + "cni.ip_pref", "none of"},
		"bad host ports": {rt + "cni.host_ports = 'ipvs'", inRuntime + "cni.host_ports", "none of"},
		"negative max":   {rt + "cni.max_conf_num = -1", inRuntime + "cni.max_conf_num", "negative"},
		"bad seccomp":    {rt + "unset_seccomp_profile = 'mine.json'", inRuntime + "unset_seccomp_profile", "none of"},
		"no sysctl":      {rt + "default_sysctls = ['net.core.somaxconn']", inRuntime + "default_sysctls", "name=value"},
		"node's sysctl":  {rt + "default_sysctls = ['net.core.somaxconn=1', 'vm.swappiness=1']", inRuntime + "default_sysctls", "vm.swappiness is not a setting of a namespace"},
		"path sysctl":    {rt + "default_sysctls = ['net/../vm/swappiness=1']", inRuntime + "default_sysctls", "not a name"},
		"odd sysctl":     {rt + "default_sysctls = ['net.core.somaxconn=|x']", inRuntime + "default_sysctls", "characters"},
		"local seccomp":  {rt + "unset_seccomp_profile = 'localhost/mine.json'", inRuntime + "unset_seccomp_profile", "absolute"},

		"bad capability":                     {rt + "default_capabilities = ['CAP_NONE']", inRuntime + "default_capabilities", "no capability"},
		"bad environment":                    {rt + "default_env = ['=x']", inRuntime + "default_env", "NAME=value"},
		"bad limit":                          {rt + "default_ulimits = ['files=1']", inRuntime + "default_ulimits", "nofile"},
		"bad limit's number":                 {rt + "default_ulimits = ['nofile=1:x']", inRuntime + "default_ulimits", "neither a number"},
		"soft above hard":                    {rt + "default_ulimits = ['nofile=2:1']", inRuntime + "default_ulimits", "above"},
		"relative profile":                   {rt + "seccomp_profile = 's.json'", inRuntime + "seccomp_profile", "absolute"},
		"bad additional_devices":             {rt + "additional_devices = ['dev/a']", inRuntime + "additional_devices", "is no device"},
		"bad allowed_devices":                {rt + "allowed_devices = ['fuse']", inRuntime + "allowed_devices", "absolute"},
		"bad privileged_seccomp_profile":     {rt + "privileged_seccomp_profile = 'p.json'", inRuntime + "privileged_seccomp_profile", "absolute"},
		"bad absent_mount_sources_to_reject": {rt + "absent_mount_sources_to_reject = ['a']", inRuntime + "absent_mount_sources_to_reject", "absolute"},
		"bad bind_mount_prefix":              {rt + "bind_mount_prefix = 'host'", inRuntime + "bind_mount_prefix", "absolute"},
		"bad timezone":                       {rt + "timezone = '../etc/passwd'", inRuntime + "timezone", "neither"},
		"bad default_mounts_file":            {rt + "default_mounts_file = 'm'", inRuntime + "default_mounts_file", "absolute"},
		"bad minimum_mappable_uid":           {rt + "minimum_mappable_uid = -2", inRuntime + "minimum_mappable_uid", "negative"},
		"bad minimum_mappable_gid":           {rt + "minimum_mappable_gid = -2", inRuntime + "minimum_mappable_gid", "negative"},
		"bad min_injected_gomaxprocs":        {rt + "min_injected_gomaxprocs = -1", inRuntime + "min_injected_gomaxprocs", "negative"},
		"inheriting from itself":             {rt + "containerd.default_runtime_name = 'runc'\ncontainerd.runtimes.runc.inherit_default_runtime = true", inRuntime + "containerd.runtimes.runc.inherit_default_runtime", "itself"},
		"inheriting and setting":             {rt + "containerd.runtimes.x = { inherit_default_runtime = true, runtime_path = '/x' }", inRuntime + "containerd.runtimes.x.inherit_default_runtime", "runtime_path"},
		"no platform":                        {rt + "containerd.runtimes.runc.platform_runtime_paths.'a/b/c/d' = '/x'", inRuntime + "containerd.runtimes.runc.platform_runtime_paths.'a/b/c/d'", "not a platform"},
		"relative runtime":                   {rt + "containerd.runtimes.runc.platform_runtime_paths.arm64 = 'x'", inRuntime + "containerd.runtimes.runc.platform_runtime_paths.arm64", "absolute"},
		"no runc for a platform":             {rt + "containerd.runtimes.x = { runtime_type = 'io.x.v2', platform_runtime_paths = { arm64 = '/x' } }", inRuntime + "containerd.runtimes.x.platform_runtime_paths", "needs"},
		"workload of nobody":                 {rt + "workloads.m.resources.cpushares = 5", inRuntime + "workloads.m.activation_annotation", "empty"},
		"negative shares":                    {rt + "workloads.m = { activation_annotation = 'a', resources = { cpushares = -5 } }", inRuntime + "workloads.m.resources.cpushares", "negative"},
		"two CPU limits":                     {rt + "workloads.m = { activation_annotation = 'a', resources = { cpuquota = 5, cpulimit = 5 } }", inRuntime + "workloads.m.resources.cpulimit", "cpuquota"},
		"workload's annotation":              {rt + "workloads.m = { activation_annotation = 'a', allowed_annotations = ['x'] }", inRuntime + "workloads.m.allowed_annotations", "none of"},
		"annotation to allow":                {rt + "containerd.runtimes.runc.allowed_annotations = ['a/b']", inRuntime + "containerd.runtimes.runc.allowed_annotations", "none of"},
		"handler's profile":                  {rt + "containerd.runtimes.runc.seccomp_profile = 's.json'", inRuntime + "containerd.runtimes.runc.seccomp_profile", "absolute"},
		"negative processes":                 {rt + "pids_limit = -1", inRuntime + "pids_limit", "negative"},
		"negative memory":                    {rt + "container_min_memory = -1", inRuntime + "container_min_memory", "negative"},

		"port":         {server + "stream_server_port = '65536'", "plugins.'io.containerd.grpc.v1.cri'.stream_server_port", "not a port"},
		"cert alone":   {server + "enable_tls_streaming = true\nx509_key_pair_streaming.tls_cert_file = '/c'", "plugins.'io.containerd.grpc.v1.cri'.x509_key_pair_streaming.tls_key_file", "needed with"},
		"key alone":    {server + "enable_tls_streaming = true\nx509_key_pair_streaming.tls_key_file = '/c'", "plugins.'io.containerd.grpc.v1.cri'.x509_key_pair_streaming.tls_cert_file", "needed with"},
		"CA, no TLS":   {server + "stream_tls_client_ca = '/c'", "plugins.'io.containerd.grpc.v1.cri'.stream_tls_client_ca", "enable_tls_streaming"},
		"TLS version":  {server + "stream_tls_min_version = '1.1'", "plugins.'io.containerd.grpc.v1.cri'.stream_tls_min_version", "neither"},
		"unsafe suite": {server + "stream_tls_cipher_suites = ['TLS_RSA_WITH_RC4_128_SHA']", "plugins.'io.containerd.grpc.v1.cri'.stream_tls_cipher_suites", "safe"},
		"suite of 1.3": {server + "stream_tls_cipher_suites = ['TLS_AES_128_GCM_SHA256']", "plugins.'io.containerd.grpc.v1.cri'.stream_tls_cipher_suites", "TLS 1.2"},
		"suites, 1.3":  {server + "stream_tls_min_version = '1.3'\nstream_tls_cipher_suites = ['TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256']", "plugins.'io.containerd.grpc.v1.cri'.stream_tls_cipher_suites", "higher"},
		"small log":    {rt + "log_size_max = 8191", inRuntime + "log_size_max", "8192"},
		"cert, no TLS": {server + "x509_key_pair_streaming.tls_cert_file = '/c'", "plugins.'io.containerd.grpc.v1.cri'.x509_key_pair_streaming.tls_cert_file", "enable_tls_streaming"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseText(t, tc.text)
			var e *KeyError
			if !errors.As(err, &e) {
				t.Fatalf("got %v, want a KeyError", err)
			}
			if e.Key != tc.key || !strings.Contains(e.Text, tc.says) {
				t.Errorf("got  %v\nwant %s: …%s…", e, tc.key, tc.says)
			}
		})
	}
}

func TestWarned(t *testing.T) {
	for name, tc := range map[string]struct{ text, key, says string }{
		"not honoured":     {rt + "containerd.ignore_rdt_not_enabled_errors = true", inRuntime + "containerd.ignore_rdt_not_enabled_errors", "no effect yet"},
		"streaming":        {rt + "containerd.runtimes.runc.io_type = 'streaming'", inRuntime + "containerd.runtimes.runc.io_type", "named pipes"},
		"no drain":         {rt + "drain_exec_sync_io_timeout = '0s'", inRuntime + "drain_exec_sync_io_timeout", "CVE-2026-53495"},
		"no CDI":           {"version = 3\n" + rt + "enable_cdi = false", inRuntime + "enable_cdi", "cdi_spec_dirs"},
		"old bin_dir":      {"version = 3\n" + rt + "cni.bin_dir = '/x'", inRuntime + "cni.bin_dir", "bin_dirs"},
		"criu path":        {rt + "containerd.runtimes.runc.options.CriuPath = '/x'", inRuntime + "containerd.runtimes.runc.options.CriuPath", "PATH"},
		"task address":     {rt + "containerd.runtimes.runc.options.TaskApiAddress = 'x'", inRuntime + "containerd.runtimes.runc.options.TaskApiAddress", "deprecated"},
		"engine":           {"version = 2\n" + server + "containerd.runtimes.runc.runtime_engine = 'x'", inRuntime + "containerd.runtimes.runc.runtime_engine", "BinaryName"},
		"runc v1":          {rt + "containerd.runtimes.runc.runtime_type = 'io.containerd.runc.v1'", inRuntime + "containerd.runtimes.runc.runtime_type", runcType},
		"no type, ignored": {"version = 2\n" + server + "containerd.default_runtime.snapshotter = 'x'", inRuntime + "containerd.default_runtime", "ignored"},
		"typo of old":      {rt + "tolerate_missing_hugepages_controller = false", inRuntime + "tolerate_missing_hugepages_controller", "hugetlb"},
		"decryption":       {images + "image_decryption.key_model = ''", inImages + "image_decryption.key_model", "no effect"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := parseText(t, tc.text)
			if err != nil {
				t.Fatal(err)
			}
			if len(p.warnings) != 1 || p.warnings[0].Key != tc.key || !strings.Contains(p.warnings[0].Text, tc.says) {
				t.Errorf("got %v\nwant %s: …%s…", p.warnings, tc.key, tc.says)
			}
		})
	}
}

// Settings that mean what the default means are not warned about.
func TestNotWarned(t *testing.T) {
	for _, text := range []string{
		rt + "selinux_category_range = 0\nstats_collect_period = '1s'\nstats_retention_period = '2m'",
		rt + "containerd.runtimes.runc.io_type = 'fifo'\ncdi_spec_dirs = []\nenable_cdi = true",
		images + "use_local_image_pull = true\nregistry.mirrors = {}\nregistry.auths = {}",
		rt + "drain_exec_sync_io_timeout = ''",
	} {
		p, err := parseText(t, text)
		if err != nil || len(p.warnings) > 0 {
			t.Errorf("%s: %v %v", text, p.warnings, err)
		}
	}
}

// TestVirtualMachines: whose pods are taken for virtual machines.
func TestVirtualMachines(t *testing.T) {
	for table, want := range map[string]bool{
		`runtime_type = "io.containerd.runc.v2"`:                                                 false,
		`runtime_type = "io.containerd.runc.v2", selinux_kvm = true`:                             true,
		`runtime_type = "io.containerd.kata.v2"`:                                                 true,
		`runtime_type = "io.containerd.kata-qemu.v2"`:                                            true,
		`runtime_type = "io.containerd.kata.v2", selinux_kvm = false`:                            false,
		`runtime_path = "/opt/kata/bin/containerd-shim-kata-v2"`:                                 true,
		`runtime_path = "/opt/kata/bin/containerd-shim-runc-v2"`:                                 false,
		`runtime_type = "io.containerd.x.v2", runtime_path = "/opt/bin/containerd-shim-kata-v2"`: false,
	} {
		p, err := parseText(t, rt+"containerd.runtimes.x = { "+table+" }\n")
		if err != nil {
			t.Fatal(err)
		}
		if got := p.runtime.Handlers["x"].SELinuxKVM; got != want {
			t.Errorf("%s: %v", table, got)
		}
	}
}

func TestMeaning(t *testing.T) {
	p, err := parseText(t, images+`
max_concurrent_downloads = -1
image_pull_progress_timeout = "0s"
runtime_platforms.kata = { platform = "linux/arm64/v8", snapshotter = "devmapper" }
registry.headers = { x-node = ["a", "b"] }
registry.auths."reg.example:5000" = { identitytoken = "t" }
pinned_images.base = "docker.io/library/base:1"
SnapShotter = "erofs"
`+rt+`
max_container_log_line_size = -1
drain_exec_sync_io_timeout = "90s"
cni.ip_pref = "cni"
cni.host_ports = "native"
containerd.runtimes.kata.runtime_type = "io.containerd.kata.v2"
containerd.runtimes.kata.sandboxer = "kuasar"
containerd.runtimes.kata.options = { hypervisor = "q", deep = { list = [1, 2] } }
containerd.runtimes.runc.options.systemdcgroup = true
containerd.runtimes.runc.container_create_timeout = "30s"
containerd.runtimes.runc.default_annotations = { "a.b/c" = "1", d = "" }
`+server+`
stream_idle_timeout = "0s"
disable_tcp_service = false
`)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, p.images.MaxConcurrentDownloads, 0)
	equal(t, p.images.PullProgressTimeout, 0)
	equal(t, p.images.Snapshotter, "erofs")
	equal(t, p.images.RuntimePlatforms["kata"].Platform.Architecture, "arm64")
	equal(t, p.images.RuntimePlatforms["kata"].Snapshotter, "devmapper")
	equal(t, p.images.Registry.Headers, map[string][]string{"X-Node": {"a", "b"}})
	equal(t, p.images.Registry.Credentials["reg.example:5000"].IdentityToken, "t")
	equal(t, len(p.images.PinnedImages), 2)
	equal(t, p.runtime.MaxLogLine, 0)
	equal(t, p.runtime.DrainExecSyncIOTimeout, 90*time.Second)
	equal(t, p.runtime.StatsRetentionPeriod, 2*time.Minute)
	equal(t, p.runtime.CNI.IPPreference, PreferCNI)
	equal(t, p.runtime.CNI.HostPorts, HostPortsNative)
	equal(t, p.runtime.Handlers["kata"].Sandboxer, "kuasar")
	equal(t, p.runtime.Handlers["kata"].Options, map[string]any{
		"hypervisor": "q", "deep": map[string]any{"list": []any{int64(1), int64(2)}},
	})
	equal(t, p.runtime.Handlers["runc"].Options["SystemdCgroup"], any(true))
	equal(t, p.runtime.Handlers["runc"].ContainerCreateTimeout, 30*time.Second)
	equal(t, p.runtime.Handlers["runc"].DefaultAnnotations, map[string]string{"a.b/c": "1", "d": ""})
	equal(t, p.server.StreamIdleTimeout, 0)
	equal(t, p.server.DisableTCPService, false)
	equal(t, p.warnings[0].Deprecation, deprecation.CRIRegistryAuths)
	if s := fmt.Sprintf("%v %+v %#v", p.images, p.images.Registry.Credentials, p.images.Registry.Credentials); strings.Contains(s, "\"t\"") {
		t.Errorf("a secret is printed: %s", s)
	}
}

// Whichever plugin migrates first, and how often, the result is the same.
func TestMigrate(t *testing.T) {
	build := func() map[string]any {
		return map[string]any{
			ServerPlugin: map[string]any{
				"sandbox_image": "old", "stats_collect_period": int64(3), "stream_server_port": "1", "enable_cdi": true,
				"containerd": map[string]any{"snapshotter": "old", "default_runtime_name": "old"},
				"cni":        map[string]any{"bin_dir": "/old", "conf_dir": "/old"},
			},
			ImagesPlugin:  map[string]any{"snapshotter": "new", "pinned_images": map[string]any{"base": "new"}},
			RuntimePlugin: map[string]any{"cni": map[string]any{"conf_dir": "/new"}},
			"other":       map[string]any{"kept": true},
		}
	}
	want := map[string]any{
		ServerPlugin: map[string]any{"stream_server_port": "1"},
		ImagesPlugin: map[string]any{"snapshotter": "old", "stats_collect_period": int64(3),
			"pinned_images": map[string]any{"base": "new", "sandbox": "old"}},
		RuntimePlugin: map[string]any{"enable_cdi": true,
			"containerd": map[string]any{"default_runtime_name": "old"},
			"cni":        map[string]any{"bin_dirs": []any{"/old"}, "conf_dir": "/new"}},
		"other": map[string]any{"kept": true},
	}
	got := build()
	for _, version := range []int{2, 2, 2, 3, 3, 3} {
		if err := Migrate(context.Background(), version, got); err != nil {
			t.Fatal(err)
		}
	}
	equal(t, got, want)

	current := build()
	if err := Migrate(context.Background(), 4, current); err != nil {
		t.Fatal(err)
	}
	equal(t, current, build())
}

// The daemon's `config dump` encodes what was decoded, so that must work and
// read back as the same.
func TestDumpReadsBack(t *testing.T) {
	cfg, err := loadFile("testdata/nvidia/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	want, err := parseConfig(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	dump := map[string]any{"version": 4, "plugins": map[string]any{}}
	for plugin, raw := range map[string]*Raw{ImagesPlugin: DefaultImages(), RuntimePlugin: DefaultRuntime(), ServerPlugin: DefaultServer(), NRIPlugin: DefaultNRI()} {
		out, err := cfg.Decode(context.Background(), plugin, raw)
		if err != nil {
			t.Fatal(err)
		}
		dump["plugins"].(map[string]any)[plugin] = out
	}
	text, err := toml.Marshal(dump)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseText(t, "version = 4\n"+strings.Replace(string(text), "version = 4\n", "", 1))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, want)
}

func TestDistance(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "abc", 0}, {"runtime_tpye", "runtime_type", 1},
		{"snapshoter", "snapshotter", 1}, {"kitten", "sitting", 3}, {strings.Repeat("x", 200), "x", 200},
	} {
		equal(t, distance(tc.a, tc.b), tc.want)
		equal(t, distance(tc.b, tc.a), tc.want)
	}
}

// FuzzParse feeds any TOML to migration and parsers: they never panic, every
// error is a KeyError, and what is accepted holds no unknown key.
func FuzzParse(f *testing.F) {
	samples, err := filepath.Glob("testdata/*.toml")
	if err != nil || len(samples) == 0 {
		f.Fatal("no samples", err)
	}
	for _, s := range samples {
		data, err := os.ReadFile(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, 2)
	}
	f.Add([]byte(rt+"containerd.runtimes = { a = 1 }\ncontainerd.default_runtime = []"), 4)
	f.Fuzz(func(t *testing.T, data []byte, fileVersion int) {
		var cfg srvconfig.Config
		if toml.Unmarshal(data, &cfg) != nil {
			t.Skip()
		}
		lines(data)
		if err := Migrate(context.Background(), fileVersion, cfg.Plugins); err != nil {
			t.Fatal(err)
		}
		for plugin, parse := range map[string]func(Raw) error{
			ImagesPlugin:  func(r Raw) error { _, _, err := ParseImages(r); return err },
			RuntimePlugin: func(r Raw) error { _, _, err := ParseRuntime(r); return err },
			ServerPlugin:  func(r Raw) error { _, _, err := ParseServer(r); return err },
			NRIPlugin:     func(r Raw) error { _, _, err := ParseNRI(r); return err },
		} {
			raw, _ := cfg.Plugins[plugin].(map[string]any)
			err := parse(raw)
			for _, e := range keyErrors(err) {
				if path := splitKey(e.Key); len(path) < 2 || path[1] != plugin {
					t.Errorf("error about %q of %s", e.Key, plugin)
				}
			}
			if err != nil && len(keyErrors(err)) == 0 {
				t.Errorf("error without a key: %v", err)
			}
			if err == nil {
				onlyKnown(t, plugin, nil, raw)
			}
		}
	})
}

// onlyKnown checks a table against the list of keys, independently of the
// walker.
func onlyKnown(t *testing.T, plugin string, path []string, table map[string]any) {
	for _, name := range slices.Sorted(maps.Keys(table)) {
		at := append(slices.Clip(path), name)
		if !slices.ContainsFunc(keys, func(k Key) bool {
			return k.Plugin == plugin && matches(strings.Split(k.Path, "."), at)
		}) {
			t.Errorf("%s: %q was accepted", plugin, at)
		}
		below, ok := table[name].(map[string]any)
		free := len(at) == 4 && strings.EqualFold(at[3], "options") || len(at) == 3 && strings.EqualFold(at[2], "options") ||
			name != "" && strings.EqualFold(name, "rewrite")
		if ok && !free {
			onlyKnown(t, plugin, at, below)
		}
	}
}

func matches(pattern, path []string) bool {
	if len(path) >= 2 && slices.Contains(handlerTables, strings.ToLower(path[0]+"."+path[1])) {
		path = append([]string{"containerd", "runtimes", "*"}, path[2:]...)
	}
	if len(path) > len(pattern) {
		return false
	}
	for i, p := range path {
		if pattern[i] != "*" && !strings.EqualFold(pattern[i], p) {
			return false
		}
	}
	return true
}
