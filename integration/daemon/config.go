package daemon

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Names of the configuration tables that tests change most.
const (
	RuntimePlugin = "io.containerd.cri.v1.runtime"
	ImagesPlugin  = "io.containerd.cri.v1.images"
	CRIPlugin     = "io.containerd.grpc.v1.cri"
)

// defaultConflist is a bridge without masquerading: pods reach the host and one
// another, nothing else. NETWORK, BRIDGE, SUBNET and IPAM are replaced.
const defaultConflist = `{
  "cniVersion": "1.1.0",
  "name": "NETWORK",
  "plugins": [
    {"type": "bridge", "bridge": "BRIDGE", "isGateway": true, "ipMasq": false, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "IPAM", "ranges": [[{"subnet": "SUBNET"}]],
              "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
  ]
}
`

// writeConfig writes config.toml, the CNI configuration and the directories
// they name.
func (in *Instance) writeConfig() error {
	for _, d := range []string{in.Root, in.CNIDir, in.LogDir, in.path("tmp"), in.path("conf.d"), in.path("certs.d")} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	if in.set.conflist != "" {
		if err := in.WriteConflist(in.set.conflist); err != nil {
			return err
		}
	}
	c := in.config()
	for _, edit := range in.set.edits {
		edit(in, c)
	}
	text, err := toml.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode config: %w", err)
	}
	if err := os.WriteFile(in.path("config.toml"), text, 0o600); err != nil {
		return fmt.Errorf("write config: %w", err)
	}
	return nil
}

// WriteConflist puts a CNI configuration in place of the one there is, with
// NETWORK, BRIDGE, SUBNET, SUBNET6 and IPAM replaced by this daemon's. As the daemon
// watches the directory, the file appears whole.
func (in *Instance) WriteConflist(json string) error {
	scope := in.slot.scope(in.Dir)
	json = strings.NewReplacer("NETWORK", scope.Network, "BRIDGE", scope.Bridge,
		"SUBNET6", in.slot.subnet6().String(), "SUBNET", scope.Subnet.String(), "IPAM", scope.IPAM).Replace(json)
	tmp := in.path("conflist.new")
	if err := os.WriteFile(tmp, []byte(json), 0o644); err != nil {
		return fmt.Errorf("write CNI configuration: %w", err)
	}
	if err := os.Rename(tmp, in.Conflist()); err != nil {
		return fmt.Errorf("write CNI configuration: %w", err)
	}
	return nil
}

// Conflist is the path of the CNI configuration.
func (in *Instance) Conflist() string { return filepath.Join(in.CNIDir, "10-test.conflist") }

// config is a configuration in which every path is the daemon's own. It has no
// key that containerd as released would not take.
func (in *Instance) config() Config {
	c := Config{
		"version": 4,
		"root":    in.Root,
		"state":   in.State,
		"imports": []string{in.path("conf.d/*.toml")},
		"debug":   Config{"level": "debug"},
	}
	plugin := func(id, key string, value any) { c.Set(value, "plugins", id, key) }
	plugin("io.containerd.server.v1.grpc", "address", in.Socket)
	plugin("io.containerd.server.v1.ttrpc", "address", in.Socket+".ttrpc")
	plugin("io.containerd.server.v1.debug", "address", in.path("debug.sock"))
	plugin("io.containerd.shim.v1.manager", "socket_dir", in.path("s"))
	plugin("io.containerd.internal.v1.opt", "path", in.path("opt"))
	plugin("io.containerd.image-verifier.v1.bindir", "bin_dir", in.path("verifiers"))
	plugin("io.containerd.nri.v1.nri", "socket_path", in.path("nri.sock"))
	plugin("io.containerd.nri.v1.nri", "plugin_path", in.path("nri/plugins"))
	plugin("io.containerd.nri.v1.nri", "plugin_config_path", in.path("nri/conf.d"))
	if in.set.noCRI {
		return c
	}
	c.Set(in.path("certs.d"), "plugins", ImagesPlugin, "registry", "config_path")
	c.Set(in.cniBins(), "plugins", RuntimePlugin, "cni", "bin_dirs")
	c.Set(in.CNIDir, "plugins", RuntimePlugin, "cni", "conf_dir")
	plugin(RuntimePlugin, "netns_mounts_under_state_dir", true)
	plugin(RuntimePlugin, "cdi_spec_dirs", []string{in.path("cdi")})
	runc := []string{"plugins", RuntimePlugin, "containerd", "runtimes", "runc"}
	c.Set("io.containerd.runc.v2", append(runc, "runtime_type")...)
	c.Set(in.RuncOptions(nil), append(runc, "options")...)
	if in.set.stock {
		c.Set(PauseImage, "plugins", ImagesPlugin, "pinned_images", "sandbox")
		// It asks for a negative OOM score, which takes CAP_SYS_RESOURCE.
		plugin(RuntimePlugin, "restrict_oom_score_adj", true)
	}
	return c
}

// RuncOptions are those of a handler that runs runc: a state directory of this
// daemon's own, the cgroup driver, and more.
func (in *Instance) RuncOptions(more Config) Config {
	c := Config{"Root": in.path("runc"), "SystemdCgroup": in.SystemdCgroup()}
	maps.Copy(c, more)
	return c
}

// cniBins are the directories of CNI plugins: beside the programs under test.
func (in *Instance) cniBins() []string {
	var dirs []string
	for _, d := range in.set.path {
		if info, err := os.Stat(filepath.Join(d, "cni")); err == nil && info.IsDir() {
			dirs = append(dirs, filepath.Join(d, "cni"))
		}
	}
	return dirs
}
