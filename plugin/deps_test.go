package plugin_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// module is the import path of the root.
const module = "github.com/gantry-cri/gantry"

// group is a set of packages with one place in the order of the program.
type group struct {
	name string
	// packages are directories; a package below one belongs to it.
	packages []string
	// may lists the groups it imports; its own package tree is always allowed.
	may []string
	// why is printed with a violation.
	why string
}

// direction is docs/design.md's table of who may import whom. From the top:
// cmd → plugin → rpc, cri → lifecycle → leaves; mechanisms hang on leaves and
// are reached through interfaces that lifecycle packages declare.
var direction = []group{
	{
		name:     "leaf",
		packages: under("plugin", "record", "undo", "flight", "lifecycle", "operation", "facts", "cgroupspath", "cgrouptree", "cgroupmove", "crilog", "advisory", "pause"),
		why:      "a leaf stands alone, so that everything can stand on it; move what both need into one leaf",
	},
	{
		name: "mechanism",
		packages: under("plugin", "store", "sandboxer", "runtime", "network", "userns", "handler", "spec", "stdio", "events",
			"stats", "nri", "cdi", "host", "rootfs", "podfiles", "selinux", "snapshot", "volume", "artifact", "notifier"),
		may: []string{"leaf", "config"},
		why: "a mechanism has one effect and knows no other mechanism: let the lifecycle package that needs both call both, and pass values (package facts)",
	},
	{
		name:     "lifecycle",
		packages: under("plugin", "sandbox", "container", "image", "stream", "checkpoint"),
		may:      []string{"leaf"},
		why:      "a lifecycle package declares the interface it needs, of one to four methods; package plugin puts the mechanism behind it",
	},
	{
		name:     "rpc",
		packages: under("plugin", "rpc"),
		may:      []string{"leaf"},
		why:      "the decorator is the same for every service, so it knows none",
	},
	{
		name:     "cri",
		packages: under("plugin", "cri"),
		may:      []string{"lifecycle", "leaf"},
		why:      "a CRI server checks a request, calls one service and converts the reply; effects are the services' business",
	},
	{
		name:     "config",
		packages: []string{"config"},
		why:      "configuration is values; those who read them import it, never the other way",
	},
	{
		name:     "snapshotter",
		packages: []string{"snapshotter"},
		may:      []string{"leaf"},
		why:      "the snapshotter also runs as a proxy plugin of a stock containerd, without the CRI service",
	},
	{
		name:     "shim",
		packages: []string{"shim"},
		may:      []string{"leaf"},
		why:      "the shim also runs under a stock containerd, without the CRI service",
	},
	{
		name:     "wiring",
		packages: []string{"plugin"}, // the root alone: its children are named above
		may:      []string{"rpc", "cri", "lifecycle", "mechanism", "leaf", "config", "snapshotter"},
		why:      "package plugin registers and wires what exists",
	},
	{
		name:     "operator",
		packages: []string{"cmd/gantry/internal"},
		may:      []string{"config", "mechanism", "leaf"},
		why:      "the operator's command looks at a node with the daemon's own eyes, and changes nothing",
	},
	{
		name:     "command",
		packages: []string{"cmd"},
		may:      []string{"wiring", "operator", "config", "snapshotter", "shim", "leaf"},
		why:      "a command is a screen of main: logic belongs below",
	},
	{
		name:     "integration",
		packages: []string{"integration"},
		may:      []string{"leaf"},
		why:      "integration tests see sockets and programs, as a kubelet does; what they import of the product they do not test",
	},
	{
		name:     "tool",
		packages: []string{"tools"},
		may:      []string{"integration", "leaf"},
		why:      "a tool of this repository is no part of the product",
	},
}

func under(dir string, names ...string) []string {
	for i, n := range names {
		names[i] = dir + "/" + n
	}
	return names
}

// place finds the group of a package, and the directory by which it belongs.
func place(pkg string) (group, string, bool) {
	for _, g := range direction {
		for _, dir := range g.packages {
			if pkg == dir || dir != "plugin" && strings.HasPrefix(pkg, dir+"/") {
				return g, dir, true
			}
		}
	}
	return group{}, "", false
}

// judge says what is wrong with one import of a package of this module by
// another; nothing is when it returns "".
func judge(from, to string) string {
	g, home, known := place(from)
	if !known {
		return fmt.Sprintf("%s has no place in the table of plugin/deps_test.go: add it to its group", from)
	}
	h, there, known := place(to)
	if !known {
		return fmt.Sprintf("%s imports %s, which has no place in the table of plugin/deps_test.go: add it to its group", from, to)
	}
	// Trees of several packages may import within themselves.
	if home == there || slices.Contains(g.may, h.name) {
		return ""
	}
	allowed := "nothing of this module"
	if len(g.may) > 0 {
		allowed = strings.Join(g.may, ", ")
	}
	return fmt.Sprintf("%s (%s) imports %s (%s): a %s may import %s; %s", from, g.name, to, h.name, g.name, allowed, g.why)
}

// TestDependencyDirection holds every import of the module's own packages, save
// those of tests, against the table.
func TestDependencyDirection(t *testing.T) {
	imports := moduleImports(t, "..")
	if len(imports) < 10 {
		t.Fatalf("only %d packages found: is this the module?", len(imports))
	}
	for from, tos := range imports {
		if _, _, known := place(from); !known && strings.HasPrefix(from, "plugin/") {
			t.Errorf("%s has no place in the table of plugin/deps_test.go: add it to its group", from)
		}
		for _, to := range tos {
			if wrong := judge(from, to); wrong != "" {
				t.Error(wrong)
			}
		}
	}
}

// TestJudge: the table means what it says.
func TestJudge(t *testing.T) {
	for _, tc := range []struct {
		from, to string
		ok       bool
	}{
		{"plugin/sandbox", "plugin/record", true},
		{"plugin/sandbox", "plugin/store", false},
		{"plugin/sandbox", "plugin/container", false},
		{"plugin/network", "plugin/store", false},
		{"plugin/network", "plugin/sandbox", false},
		{"plugin/network/networktest", "plugin/network", true},
		{"plugin/record", "plugin/facts", false},
		{"plugin/rpc", "plugin/cri", false},
		{"plugin/cri", "plugin/sandbox", true},
		{"plugin/cri", "plugin/store", false},
		{"plugin", "plugin/store", true},
		{"plugin", "shim/task", false},
		{"plugin/store", "plugin", false},
		{"plugin/nobody", "plugin/record", false},
		{"shim/task", "shim/process", true},
		{"shim/logs", "plugin/crilog", true},
		{"shim/task", "plugin/sandboxer", false},
		{"snapshotter/erofs", "snapshotter", true},
		{"snapshotter", "shim/oci", false},
		{"cmd/containerd", "plugin", true},
		{"cmd/containerd", "plugin/sandbox", false},
		{"integration/fault", "integration/daemon", true},
		{"integration/daemon", "plugin/store", false},
		{"tools/demo", "integration/daemon", true},
		{"config", "plugin/record", false},
	} {
		if got := judge(tc.from, tc.to); (got == "") != tc.ok {
			t.Errorf("%s → %s: %q", tc.from, tc.to, got)
		}
	}
}

// moduleImports reads which packages of the module each package's own files
// import, without building anything.
func moduleImports(t *testing.T, root string) map[string][]string {
	t.Helper()
	imports := map[string][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			skip := []string{"testdata", ".git", filepath.Join(root, "bin"), filepath.Join(root, "out"), filepath.Join(root, "run")}
			if slices.Contains(skip, name) || slices.Contains(skip, path) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		found, err := fileImports(path)
		if err != nil {
			return err
		}
		imports[pkg] = append(imports[pkg], found...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg, found := range imports {
		slices.Sort(found)
		imports[pkg] = slices.Compact(found)
	}
	return imports
}

func fileImports(path string) ([]string, error) {
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", path, err)
	}
	var found []string
	for _, spec := range f.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("read import in %s: %w", path, err)
		}
		if own, ok := strings.CutPrefix(imported, module+"/"); ok {
			found = append(found, own)
		}
	}
	return found, nil
}
