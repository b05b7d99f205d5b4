package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/gantry-cri/gantry/cmd/gantry/internal/daemon"
	"github.com/gantry-cri/gantry/cmd/gantry/internal/node"
	"github.com/gantry-cri/gantry/plugin/operation"
)

type result struct {
	code      int
	out, errs string
}

func gantry(t *testing.T, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	code := Run(t.Context(), args, &out, &errs)
	return result{code, out.String(), errs.String()}
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"nonsense"}, {"--nonsense"}, {"version", "x"}, {"config", "x"}, {"config", "check"}, {"config", "check", "a", "b"},
		{"config", "default", "x"}, {"ops", "x"}, {"ops", "--every", "soon"}, {"ops", "--every", "0s"}, {"ops", "--watch", "--stacks"},
		{"check", "x"}, {"version", "--output", "xml"}, {"ops", "-o"},
	} {
		r := gantry(t, args...)
		if r.code != exitUsage || r.out != "" || !strings.HasPrefix(r.errs, "gantry: ") {
			t.Errorf("%q: %+v", args, r)
		}
	}
}

// Every command explains itself: what it does, an example, the exit codes.
func TestHelp(t *testing.T) {
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Name() == "help" || c.Name() == "completion" {
			return
		}
		if c.Short == "" || c.Long == "" || !strings.Contains(c.Long, "Exit codes:") || !c.HasSubCommands() && c.Example == "" {
			t.Errorf("%s does not explain itself", c.CommandPath())
		}
		r := gantry(t, append(strings.Fields(c.CommandPath())[1:], "--help")...)
		if r.code != exitOK || !strings.Contains(r.out, "Exit codes:") {
			t.Errorf("%s --help: %+v", c.CommandPath(), r)
		}
		for _, below := range c.Commands() {
			visit(below)
		}
	}
	visit((&app{out: io.Discard}).root())
	if r := gantry(t); r.code != exitOK || !strings.Contains(r.out, "gantry check") {
		t.Errorf("without a command: %+v", r)
	}
}

func TestVersion(t *testing.T) {
	r := gantry(t, "version", "-o", "json")
	var v versions
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || r.code != exitOK {
		t.Fatalf("%+v: %v", r, err)
	}
	if v.Gantry == "" || v.Containerd == "" || v.Go == "" || !strings.HasPrefix(v.Platform, "linux/") {
		t.Errorf("got %+v", v)
	}
	if r := gantry(t, "version"); r.code != exitOK || !strings.Contains(r.out, "containerd  "+v.Containerd) {
		t.Errorf("got %+v", r)
	}
}

func TestConfigCheck(t *testing.T) {
	const table = "version = 4\n[plugins.'io.containerd.cri.v1.runtime']\n"
	good := write(t, table+"max_container_log_line_size = 1\n")
	if r := gantry(t, "config", "check", good); r.code != exitOK || r.out != "0 errors, 0 warnings in 1 files\n" {
		t.Errorf("good: %+v", r)
	}
	warned := write(t, table+"containerd.ignore_rdt_not_enabled_errors = true\n")
	r := gantry(t, "config", "check", warned)
	if r.code != exitOK || !strings.Contains(r.out, "warning: "+warned+":3: ") || !strings.Contains(r.out, "0 errors, 1 warnings") {
		t.Errorf("warned: %+v", r)
	}
	wrong := write(t, table+"max_container_log_line_sise = 1\n")
	r = gantry(t, "config", "check", wrong)
	if r.code != exitFound || !strings.Contains(r.out, "error:   "+wrong+":3: ") || !strings.Contains(r.out, "max_container_log_line_size") || r.errs != "" {
		t.Errorf("wrong: %+v", r)
	}
	broken := write(t, "version = ")
	if r = gantry(t, "config", "check", broken); r.code != exitFound || !strings.Contains(r.out, "error:   "+broken+": ") {
		t.Errorf("broken: %+v", r)
	}
	gone := filepath.Join(t.TempDir(), "gone.toml")
	if r = gantry(t, "config", "check", gone); r.code != exitFailed || !strings.Contains(r.errs, gone) || !strings.Contains(r.errs, "/etc/containerd/config.toml") {
		t.Errorf("gone: %+v", r)
	}
}

func TestConfigCheckJSON(t *testing.T) {
	wrong := write(t, "version = 4\n[plugins.'io.containerd.cri.v1.runtime']\nmax_container_log_line_sise = 1\ncontainerd.ignore_rdt_not_enabled_errors = true\n")
	r := gantry(t, "config", "check", wrong, "--output", "json")
	var c checked
	if err := json.Unmarshal([]byte(r.out), &c); err != nil || r.code != exitFound {
		t.Fatalf("%+v: %v", r, err)
	}
	if len(c.Files) != 1 || len(c.Errors) != 1 || c.Errors[0].Line != 3 || c.Errors[0].File != wrong || len(c.Warnings) != 1 || c.Warnings[0].Line != 4 {
		t.Errorf("got %+v", c)
	}
	r = gantry(t, "config", "check", write(t, "version = 4\n"), "--output", "json")
	if r.code != exitOK || strings.Contains(r.out, "null") {
		t.Errorf("nothing wrong: %+v", r)
	}
}

func TestConfigDefault(t *testing.T) {
	r := gantry(t, "config", "default")
	if r.code != exitOK {
		t.Fatalf("%+v", r)
	}
	if r := gantry(t, "config", "check", write(t, r.out)); r.code != exitOK {
		t.Errorf("the default is refused: %+v", r)
	}
	var text, program struct{ Plugins map[string]map[string]any }
	if err := toml.Unmarshal([]byte(r.out), &text); err != nil {
		t.Fatal(err)
	}
	r = gantry(t, "config", "default", "-o", "json")
	if err := json.Unmarshal([]byte(r.out), &program); err != nil {
		t.Fatal(err)
	}
	for plugin, keys := range text.Plugins {
		for key := range keys {
			if _, ok := program.Plugins[plugin][key]; !ok {
				t.Errorf("%s.%s is not in the JSON", plugin, key)
			}
		}
	}
	if len(text.Plugins) != 4 {
		t.Errorf("plugins %v", text.Plugins)
	}
}

// serveOps serves a table where a daemon with that state directory would.
func serveOps(t *testing.T) (state string, table *operation.Table) {
	t.Helper()
	state, table = t.TempDir(), &operation.Table{}
	socket := daemon.Layout{State: state}.OpsSocket()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: table.Handler()}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return state, table
}

func TestOps(t *testing.T) {
	state, table := serveOps(t)
	if r := gantry(t, "ops", "--state", state); r.code != exitOK || !strings.Contains(r.out, "nothing is under way") {
		t.Errorf("idle: %+v", r)
	}
	if r := gantry(t, "ops", "--state", state, "-o", "json"); r.code != exitOK || r.out != "[]\n" {
		t.Errorf("idle: %+v", r)
	}
	ctx, op := table.Begin(t.Context(), operation.Info{Name: "run", Object: "pod default/web", ID: strings.Repeat("ab", 32)})
	defer op.End()
	operation.Stage(ctx, "attach network")
	r := gantry(t, "ops", "--state", state)
	for _, want := range []string{"OPERATION", "run", "pod default/web", "ababababababa ", "attach network"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("%q is not in %+v", want, r)
		}
	}
	r = gantry(t, "ops", "--state", state, "-o", "json")
	var entries []operation.Entry
	if err := json.Unmarshal([]byte(r.out), &entries); err != nil || len(entries) != 1 || entries[0].Stage != "attach network" {
		t.Errorf("%+v: %v", r, err)
	}
	if r := gantry(t, "ops", "--state", state, "--stacks"); r.code != exitOK || !strings.Contains(r.out, "cli.TestOps") {
		t.Errorf("stacks: %+v", r)
	}
	if r := gantry(t, "ops", "--state", state, "--stacks", "-o", "json"); r.code != exitOK || !strings.Contains(r.out, `"stacks"`) {
		t.Errorf("stacks: %+v", r)
	}
	if r := gantry(t, "ops", "--state", t.TempDir()); r.code != exitFailed || !strings.Contains(r.errs, "--state") {
		t.Errorf("no daemon: %+v", r)
	}
}

// stopper ends a command when it has written that many times.
type stopper struct {
	bytes.Buffer
	left int
	stop context.CancelFunc
}

func (s *stopper) Write(p []byte) (int, error) {
	if s.left--; s.left == 0 {
		s.stop()
	}
	return s.Buffer.Write(p)
}

func TestOpsWatch(t *testing.T) {
	state, _ := serveOps(t)
	ctx, cancel := context.WithCancel(t.Context())
	out := &stopper{left: 3, stop: cancel}
	code := Run(ctx, []string{"ops", "--state", state, "--watch", "--every", "1ms", "-o", "json"}, out, io.Discard)
	if code != exitOK || out.String() != "[]\n[]\n[]\n" {
		t.Errorf("code %d, printed %q", code, out.String())
	}
}

func TestOpsTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var table operation.Table
		ctx, _ := table.Begin(t.Context(), operation.Info{Name: "PullImage"})
		time.Sleep(1500 * time.Millisecond) // the bubble's clock
		operation.Stage(ctx, "fetch")
		time.Sleep(20 * time.Millisecond)
		var b bytes.Buffer
		if err := opsTable(&b, table.List(), time.Now()); err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(strings.Split(b.String(), "\n")[1])
		if len(fields) != 7 || fields[1] != "-" || fields[2] != "-" || fields[4] != "1.52s" || fields[6] != "20ms" {
			t.Errorf("got\n%s", b.String())
		}
	})
}

func TestShowCheck(t *testing.T) {
	for _, tc := range []struct {
		status node.Status
		err    error
		mark   string
	}{
		{node.OK, nil, "  ok    x: found\n"}, {node.Warn, nil, "  WARN  x: found\n"},
		{node.Skipped, nil, "  skip  x: found\n"}, {node.Fail, errFound, "  FAIL  x: found\n"},
	} {
		findings := []node.Finding{{Area: "kernel", Name: "a", Status: node.OK, Text: "t"}, {Area: "network", Name: "x", Status: tc.status, Text: "found", Advice: "do this"}}
		var b bytes.Buffer
		err := (&app{out: &b, format: "text"}).showCheck(findings)
		if !errors.Is(err, tc.err) || !strings.Contains(b.String(), "\nnetwork\n"+tc.mark+"        → do this\n") {
			t.Errorf("%s: %v\n%s", tc.status, err, b.String())
		}
		b.Reset()
		err = (&app{out: &b, format: "json"}).showCheck(findings)
		var e examined
		if jerr := json.Unmarshal(b.Bytes(), &e); jerr != nil || !errors.Is(err, tc.err) || e.Status != tc.status || len(e.Findings) != 2 {
			t.Errorf("%s: %v %v %+v", tc.status, err, jerr, e)
		}
	}
}

// The command itself, on whatever machine runs the test: it comes to a verdict
// without a daemon, and says that there is none.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	config := write(t, "version = 4\nroot = '"+dir+"/root'\nstate = '"+dir+"/state'\n")
	r := gantry(t, "check", "--config", config, "--address", filepath.Join(dir, "none.sock"), "-o", "json")
	var e examined
	if err := json.Unmarshal([]byte(r.out), &e); err != nil || r.code != exitOK && r.code != exitFound {
		t.Fatalf("%+v: %v", r, err)
	}
	areas := map[string]bool{}
	for _, f := range e.Findings {
		areas[f.Area] = true
		if f.Area == "daemon" && (f.Status != node.Warn || !strings.Contains(f.Text, "none.sock")) {
			t.Errorf("got %+v", f)
		}
	}
	if len(areas) != 5 {
		t.Errorf("areas %v", areas)
	}
	if r := gantry(t, "check", "--config", write(t, "version =")); r.code != exitFailed || r.errs == "" {
		t.Errorf("broken configuration: %+v", r)
	}
}

func TestCheckFlags(t *testing.T) {
	f := checkFlags{config: filepath.Join(t.TempDir(), "none"), root: "/r", state: "/s", address: "/a"}
	l, err := f.layout()
	if err != nil || l.Root != "/r" || l.State != "/s" || l.Address != "/a" {
		t.Errorf("got %+v, %v", l, err)
	}
}
