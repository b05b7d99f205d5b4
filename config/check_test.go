package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func write(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config.toml")
}

func TestCheckLocates(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, map[string]string{
		"config.toml": `version = 2
imports = ["conf.d/*.toml"]
plugin_dir = ""
no_such_section = 1
[plugins."io.containerd.grpc.v1.cri"]
  enable_selinux = true
  sandbox_imgae = "x"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = 7
`,
		"conf.d/10.toml": `version = 4
[plugins."io.containerd.cri.v1.runtime"]
cni = { max_conf_num = -2 }
`,
		"conf.d/20.toml": `version = 3
[plugins."io.containerd.cri.v1.runtime"]
stats_collect_period = "5s"
`,
	})
	r, err := Check(path)
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	equal(t, r.Files, []string{path, at("conf.d/10.toml"), at("conf.d/20.toml")})
	equal(t, places(r.Errors), []string{
		at("conf.d/10.toml") + ":3: " + inRuntime + "cni.max_conf_num",
		path + ":7: " + inRuntime + "sandbox_imgae",
		path + ":9: " + inImages + "snapshotter",
	})
	equal(t, places(r.Warnings), []string{
		at("conf.d/20.toml") + ":3: " + inRuntime + "stats_collect_period",
		path + ":3: plugin_dir",
		path + ":4: no_such_section",
	})
}

func TestCheckDisabled(t *testing.T) {
	r, err := Check("testdata/docker-package.toml")
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Warnings) != 1 || r.Warnings[0].Line != 3 || !strings.Contains(r.Warnings[0].String(), ServerPlugin) {
		t.Errorf("got %v", r.Warnings)
	}
}

func TestCheckUnloadable(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"not there":        {},
		"not TOML":         {"config.toml": "version = "},
		"newer":            {"config.toml": "version = 5"},
		"import not there": {"config.toml": "version = 4\nimports = ['gone.toml']"},
	} {
		if r, err := Check(write(t, t.TempDir(), files)); err == nil {
			t.Errorf("%s: accepted as %v", name, r)
		}
	}
	path := write(t, t.TempDir(), map[string]string{"config.toml": "version = 4\nplugins.'io.containerd.cri.v1.runtime' = 3"})
	r, err := Check(path)
	if err != nil || len(r.Errors) != 1 || r.Errors[0].Line != 2 {
		t.Errorf("got %v, %v, want one error in line 2", r, err)
	}
}

func TestCheckCircularImport(t *testing.T) {
	path := write(t, t.TempDir(), map[string]string{"config.toml": "version = 4\nimports = ['config.toml']"})
	r, err := Check(path)
	if err != nil || len(r.Files) != 1 {
		t.Errorf("got %v, %v", r, err)
	}
}

func places(findings []Finding) []string {
	var out []string
	for _, f := range findings {
		out = append(out, strings.TrimSuffix(f.String(), ": "+f.Text))
	}
	slices.Sort(out)
	return out
}
