package node

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/plugin/advisory"
)

// netConf is a CNI configuration as far as it is looked at.
type netConf struct {
	file string
	list *libcni.NetworkConfigList
}

func (n Node) network(ctx context.Context) []Finding {
	l := &list{area: "network"}
	specs := map[string]bool{} // specification versions used, by plugin type
	types := map[string][]string{}
	for _, dir := range n.Layout.Networks {
		for _, c := range n.configurations(l, dir) {
			for _, t := range pluginTypes(c.list) {
				if key := t + " " + c.list.CNIVersion; !specs[key] {
					specs[key] = true
					types[t] = append(types[t], c.list.CNIVersion)
				}
			}
		}
	}
	names := make([]string, 0, len(types))
	for t := range types {
		names = append(names, t)
	}
	slices.Sort(names)
	for _, t := range names {
		n.plugin(ctx, l, t, types[t])
	}
	return l.all
}

// configurations reports on a directory and returns what of it pods use.
func (n Node) configurations(l *list, dir daemon.NetworkDir) []netConf {
	const advice = "put a CNI configuration there; cluster networks such as Cilium, Calico or flannel do it when they start"
	files, err := libcni.ConfFiles(n.path(dir.Path), []string{".conf", ".conflist", ".json"})
	if err != nil {
		l.add(dir.Path, Fail, "", "cannot be read: %v", err)
		return nil
	}
	if len(files) == 0 {
		l.add(dir.Path, Fail, advice, "holds no network configuration; only pods on the node's own network can start")
		return nil
	}
	slices.Sort(files)
	if dir.Default != "" {
		return n.named(l, dir, files)
	}
	var out []netConf
	for i, f := range files {
		name := filepath.Join(dir.Path, filepath.Base(f))
		if dir.Max > 0 && i >= dir.Max {
			l.ok(name, "not used: max_conf_num is %d, and this comes later in the order of names", dir.Max)
			continue
		}
		list, err := readNetConf(f)
		if err != nil {
			l.add(name, Fail, "correct the file; until then no pod gets a network", "%v", err)
			continue
		}
		out = append(out, netConf{name, list}.used(l))
	}
	return out
}

// named is configurations for a directory with a default network, whose file
// comes first whatever it is called. A file that cannot be read is passed over.
func (n Node) named(l *list, dir daemon.NetworkDir, files []string) []netConf {
	var all []netConf
	found := false
	for _, f := range files {
		c := netConf{file: filepath.Join(dir.Path, filepath.Base(f))}
		var err error
		if c.list, err = readNetConf(f); err != nil {
			l.add(c.file, Warn, "correct the file, or remove it", "is passed over: %v", err)
			continue
		}
		if !found && c.list.Name == dir.Default {
			found = true
			all = slices.Insert(all, 0, c)
			continue
		}
		all = append(all, c)
	}
	if !found {
		l.add(dir.Path, Fail, "put its configuration there, or correct cni.default_network; until then no pod gets a network",
			"has no network %q, which cni.default_network names", dir.Default)
		return nil
	}
	for i, c := range all {
		if dir.Max > 0 && i >= dir.Max {
			l.ok(c.file, "not used: max_conf_num is %d, and this comes after the default network in the order of names", dir.Max)
			continue
		}
		c.used(l)
	}
	if dir.Max > 0 && len(all) > dir.Max {
		all = all[:dir.Max]
	}
	return all
}

// used reports a configuration that pods get.
func (c netConf) used(l *list) netConf {
	l.ok(c.file, "network %q: %s (CNI %s)", c.list.Name, strings.Join(pluginTypes(c.list), ", "), c.list.CNIVersion)
	return c
}

// readNetConf reads either form of a configuration as a list.
func readNetConf(path string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(path) == ".conflist" {
		return libcni.ConfListFromFile(path)
	}
	conf, err := libcni.ConfFromFile(path)
	if err != nil {
		return nil, err
	}
	if conf.Network.Type == "" {
		return nil, fmt.Errorf("%s names no plugin type", filepath.Base(path))
	}
	return libcni.ConfListFromConf(conf)
}

// pluginTypes are the programs that a network runs, those for addresses too.
func pluginTypes(list *libcni.NetworkConfigList) []string {
	var types []string
	add := func(t string) {
		if t != "" && !slices.Contains(types, t) {
			types = append(types, t)
		}
	}
	for _, p := range list.Plugins {
		add(p.Network.Type)
		add(p.Network.IPAM.Type)
	}
	return types
}

// plugin reports on one plugin, which must know the specification versions.
func (n Node) plugin(ctx context.Context, l *list, name string, wants []string) {
	path, ok := n.find(name, n.Layout.BinDirs)
	if !ok || strings.ContainsRune(name, filepath.Separator) {
		l.add("plugin "+name, Fail, "install it there (Debian: containernetworking-plugins, or from your network's vendor), or set bin_dirs in the configuration",
			"is configured and not found in %s", strings.Join(n.Layout.BinDirs, ", "))
		return
	}
	about, specs, err := n.Versions.Plugin(ctx, n.path(path))
	if err != nil {
		l.add("plugin "+name, Fail, "run it by hand: CNI_COMMAND=VERSION "+path, "%s does not tell its version: %v", path, err)
		return
	}
	for _, want := range wants {
		if !slices.Contains(specs, want) {
			l.add("plugin "+name, Fail, "update the plugin, or lower cniVersion in the configuration",
				"%s does not know CNI %s that its configuration asks for; it knows %s", path, want, strings.Join(specs, ", "))
			return
		}
	}
	v := advisory.Find(about)
	if v == nil {
		l.ok("plugin "+name, "%s, of unknown version", path)
		return
	}
	if found := advisory.Plugin(name, v); len(found) > 0 {
		l.add("plugin "+name, Warn, "update the CNI plugins", "%s is %s; %s", path, v, found[0])
		return
	}
	l.ok("plugin "+name, "%s, version %s", path, v)
}

// books are the directories where host-local keeps the addresses it gave out.
func (n Node) books() []string {
	var dirs []string
	for _, dir := range n.Layout.Networks {
		files, err := libcni.ConfFiles(n.path(dir.Path), []string{".conf", ".conflist", ".json"})
		if err != nil {
			continue // network tells
		}
		for _, f := range files {
			list, err := readNetConf(f)
			if err != nil {
				continue
			}
			for _, d := range booksOf(list) {
				if !slices.Contains(dirs, d) {
					dirs = append(dirs, d)
				}
			}
		}
	}
	return dirs
}

func booksOf(list *libcni.NetworkConfigList) []string {
	var dirs []string
	for _, p := range list.Plugins {
		if p.Network.IPAM.Type != "host-local" {
			continue
		}
		var conf struct {
			IPAM struct {
				DataDir string `json:"dataDir"`
			} `json:"ipam"`
		}
		if json.Unmarshal(p.Bytes, &conf) != nil {
			continue
		}
		base := conf.IPAM.DataDir
		if base == "" {
			base = "/var/lib/cni/networks"
		}
		dirs = append(dirs, filepath.Join(base, list.Name))
	}
	return dirs
}

// holder reads who has an address: the first line of host-local's file.
func (n Node) holder(file string) string {
	b, err := os.ReadFile(n.path(file))
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(first)
}
