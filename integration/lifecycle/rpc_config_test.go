package lifecycle

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/gantry-cri/gantry/integration/daemon"
)

type table = map[string]any

// TestCFG_01_Versions: the same settings in a file of each version of
// containerd's configuration make the same daemon.
func TestCFG_01_Versions(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set(false, "plugins", daemon.RuntimePlugin, "enable_unprivileged_ports"))
	plain(t, d)
	path := filepath.Join(d.Dir, "config.toml")
	var latest table
	text, err := os.ReadFile(path)
	if err == nil {
		err = toml.Unmarshal(text, &latest)
	}
	if err != nil {
		t.Fatal(err)
	}
	for version, convert := range map[int]func(table) table{
		2: func(c table) table { return toVersion2(toVersion3(c)) },
		3: toVersion3,
		4: func(c table) table { return c },
	} {
		d.Stop()
		old := convert(maps.Clone(latest))
		old["version"] = version
		text, err := toml.Marshal(old)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		d.Up()
		p := runPod(d, "configured")
		ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
		if got := sh(d, ctr, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start"); got == "0" {
			t.Errorf("version %d: enable_unprivileged_ports = false has no effect", version)
		}
		if len(netnsMounts(t, d)) != 1 {
			t.Errorf("version %d: netns_mounts_under_state_dir has no effect", version)
		}
		if !exists(filepath.Join(d.Dir, "runc", daemon.Namespace, ctr)) {
			t.Errorf("version %d: the option Root of the runtime has no effect", version)
		}
		names, _ := handlers(t, d)
		if _, ok := names[otherHandler]; !ok {
			t.Errorf("version %d: handlers are %v", version, names)
		}
		if err := removePod(d, p.id); err != nil {
			t.Error(err)
		}
		dumped(t, d, path, version)
	}
}

// toVersion3 moves the addresses to where they were.
func toVersion3(c table) table {
	plugins := maps.Clone(c["plugins"].(table))
	c["plugins"] = plugins
	for plugin, section := range map[string]string{
		"io.containerd.server.v1.grpc": "grpc", "io.containerd.server.v1.ttrpc": "ttrpc", "io.containerd.server.v1.debug": "debug",
	} {
		into, ok := c[section].(table)
		if !ok {
			into = table{}
		}
		into = maps.Clone(into)
		maps.Copy(into, plugins[plugin].(table))
		c[section] = into
		delete(plugins, plugin)
	}
	return c
}

// toVersion2 puts the two CRI tables into the one there was.
func toVersion2(c table) table {
	plugins := c["plugins"].(table)
	one := maps.Clone(plugins[daemon.RuntimePlugin].(table))
	one["registry"] = plugins[daemon.ImagesPlugin].(table)["registry"]
	cni := maps.Clone(one["cni"].(table))
	cni["bin_dir"] = cni["bin_dirs"].([]any)[0]
	delete(cni, "bin_dirs")
	one["cni"] = cni
	delete(plugins, daemon.RuntimePlugin)
	delete(plugins, daemon.ImagesPlugin)
	plugins[daemon.CRIPlugin] = one
	return c
}

// dumped checks that the daemon's program shows every key that there is, with
// the values of the file.
func dumped(t *testing.T, d *daemon.Daemon, path string, version int) {
	t.Helper()
	program := fmt.Sprintf("/proc/%d/exe", d.PID())
	var all, shown table
	for into, args := range map[*table][]string{&all: {"config", "default"}, &shown: {"--config", path, "config", "dump"}} {
		out, err := exec.Command(program, args...).Output()
		if err == nil {
			err = toml.Unmarshal(out, into)
		}
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
	}
	for _, plugin := range []string{daemon.ImagesPlugin, daemon.RuntimePlugin, daemon.CRIPlugin} {
		have := keysOf(shown["plugins"].(table)[plugin], plugin)
		for _, key := range keysOf(all["plugins"].(table)[plugin], plugin) {
			if !slices.Contains(have, key) && !strings.Contains(key, ".options.") {
				t.Errorf("version %d: the dump has no %s", version, key)
			}
		}
	}
	runtime := shown["plugins"].(table)[daemon.RuntimePlugin].(table)
	if runtime["enable_unprivileged_ports"] != false || runtime["cni"].(table)["conf_dir"] != d.CNIDir {
		t.Errorf("version %d: the dump has %v", version, runtime)
	}
}

func keysOf(v any, path string) (keys []string) {
	t, ok := v.(table)
	if !ok {
		return []string{path}
	}
	for k, below := range t {
		keys = append(keys, keysOf(below, path+"."+k)...)
	}
	return keys
}

// TestCFG_01_Strict: a daemon with a setting that it does not know, or cannot
// mean, does not start and says why.
func TestCFG_01_Strict(t *testing.T) {
	t.Parallel()
	runtime := func(value any, path ...string) daemon.Option {
		return daemon.Set(value, append([]string{"plugins", daemon.RuntimePlugin}, path...)...)
	}
	for name, c := range map[string]struct {
		option daemon.Option
		words  []string
	}{
		"a misspelt key":         {runtime(1, "max_container_log_line_sice"), []string{"max_container_log_line_sice", "max_container_log_line_size"}},
		"a misspelt inner key":   {runtime("x", "cni", "conf_dri"), []string{"cni.conf_dri", "cni.conf_dir"}},
		"a key of another table": {daemon.Set(true, "plugins", daemon.ImagesPlugin, "enable_selinux"), []string{"enable_selinux", daemon.RuntimePlugin}},
		"a string for a number":  {runtime("much", "max_container_log_line_size"), []string{"max_container_log_line_size"}},
		"a bad duration":         {runtime("soon", "drain_exec_sync_io_timeout"), []string{"drain_exec_sync_io_timeout", "soon"}},
		"no such handler":        {runtime("nobody", "containerd", "default_runtime_name"), []string{"default_runtime_name", "nobody"}},
		"a node's sysctl":        {runtime([]string{"vm.swappiness=1"}, "default_sysctls"), []string{"default_sysctls", "vm.swappiness"}},
		"an unknown preference":  {runtime("ipv5", "cni", "ip_pref"), []string{"ip_pref", "ipv5"}},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := daemon.Launch(t.Context(), options(c.option, daemon.Edit(requireCRI))...)
			if err == nil {
				t.Fatalf("it serves: %v", in.Discard())
			}
			for _, w := range c.words {
				if !strings.Contains(fmt.Sprint(err), w) {
					t.Errorf("%q is not in what it says: %v", w, err)
				}
			}
		})
	}
}

// requireCRI ends a daemon at once whose CRI does not come up.
func requireCRI(_ *daemon.Instance, c daemon.Config) {
	c["required_plugins"] = []string{daemon.CRIPlugin, daemon.RuntimePlugin, daemon.ImagesPlugin}
}
