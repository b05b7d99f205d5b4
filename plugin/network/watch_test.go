package network_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestConfWatch does to the configuration directory what installers and
// administrators do, and wants Ready to follow within two
// seconds.
func TestConfWatch(t *testing.T) {
	var took []time.Duration
	for _, c := range []struct {
		name string
		away func(h *host) error
		back func(h *host) error
	}{
		{"directory removed and made again",
			func(h *host) error { return os.RemoveAll(h.conf.ConfDir) },
			func(h *host) error { h.good(); return nil }},
		{"parents removed and made again",
			func(h *host) error { return os.RemoveAll(filepath.Join(h.root, "etc")) },
			func(h *host) error { h.good(); return nil }},
		{"directory renamed and back",
			func(h *host) error { return os.Rename(h.conf.ConfDir, h.conf.ConfDir+".old") },
			func(h *host) error { return os.Rename(h.conf.ConfDir+".old", h.conf.ConfDir) }},
		{"parent renamed, another one in its place",
			func(h *host) error { return os.Rename(filepath.Join(h.root, "etc"), filepath.Join(h.root, "was")) },
			func(h *host) error { h.good(); return nil }},
		{"file removed and written again",
			func(h *host) error { return os.Remove(h.file()) },
			func(h *host) error { h.good(); return nil }},
		{"file broken and mended",
			func(h *host) error { return os.WriteFile(h.file(), []byte(`{"name":`), 0o644) },
			func(h *host) error { h.good(); return nil }},
		{"a broken file sorted before the good one",
			func(h *host) error {
				return os.WriteFile(filepath.Join(h.conf.ConfDir, "00-bad.conf"), []byte("{}"), 0o644)
			},
			func(h *host) error { return os.Remove(filepath.Join(h.conf.ConfDir, "00-bad.conf")) }},
		{"symbolic link to an empty directory, and swapped",
			func(h *host) error {
				if err := os.Rename(h.conf.ConfDir, filepath.Join(h.root, "v1")); err != nil {
					return err
				}
				if err := os.Mkdir(filepath.Join(h.root, "v2"), 0o755); err != nil {
					return err
				}
				return os.Symlink(filepath.Join(h.root, "v2"), h.conf.ConfDir)
			},
			func(h *host) error {
				next := h.conf.ConfDir + ".next"
				if err := os.Symlink(filepath.Join(h.root, "v1"), next); err != nil {
					return err
				}
				return os.Rename(next, h.conf.ConfDir)
			}},
		{"plugin removed and installed again",
			func(h *host) error { return os.Rename(h.plugin(), h.plugin()+".away") },
			func(h *host) error { return os.Rename(h.plugin()+".away", h.plugin()) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.good()
			h.open()
			ready := func() bool { return h.net.Ready(t.Context()) == nil }
			if !ready() {
				t.Fatalf("not ready at start: %v", h.net.Ready(t.Context()))
			}
			for range 2 {
				mustDo(t, c.away(h))
				gone := eventually(t, "not ready", func() bool { return !ready() })
				mustDo(t, c.back(h))
				took = append(took, gone, eventually(t, "ready again", ready))
				if strings.Contains(c.name, "another one") || strings.Contains(c.name, "symbolic") {
					break // leaves names behind, works once
				}
			}
		})
	}
	// Most of them, as a loaded machine may stop for a second.
	slices.Sort(took)
	if n := len(took); n == 0 || took[n*3/4] > 2*time.Second {
		t.Errorf("noticing took %v", took)
	}
}

func (h *host) good() { h.write("10-test.conflist", h.stubConf("one", "1.0.0")) }

func (h *host) file() string { return filepath.Join(h.conf.ConfDir, "10-test.conflist") }

func (h *host) plugin() string { return filepath.Join(h.root, "bin", stubName) }

// TestLateConf starts without a directory and says what is missing.
func TestLateConf(t *testing.T) {
	h := newHost(t)
	mustDo(t, os.RemoveAll(filepath.Join(h.root, "etc")))
	h.open()
	err := h.net.Ready(t.Context())
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no network configuration in "+h.conf.ConfDir) {
		t.Errorf("ready: %v", err)
	}
	h.good()
	eventually(t, "ready", func() bool { return h.net.Ready(t.Context()) == nil })
}

func TestUpdatePodCIDR(t *testing.T) {
	const text = `{"cniVersion":"1.0.0","name":"{{.PodCIDR}}","plugins":[{"type":"stub","dir":"{{len .PodCIDRRanges}}",
		"routes":[{{range $i, $r := .Routes}}{{if $i}},{{end}}"{{$r}}"{{end}}]}]}`
	for _, c := range []struct {
		name, template, cidrs, want string
		refused                     func(error) bool
	}{
		{name: "dual", template: strings.Replace(text, "{{.PodCIDR}}", "x", 1), cidrs: "10.88.1.0/24, fd00:1::/64",
			want: `"dir":"2",
		"routes":["0.0.0.0/0","::/0"]`},
		{name: "one", template: strings.Replace(text, "{{.PodCIDR}}", "x", 1) + "{{/* {{.PodCIDR}} */}}", cidrs: "fd00:1::/64",
			want: `"dir":"1",
		"routes":["::/0"]`},
		{name: "no range", template: text, cidrs: ""},
		{name: "bad range", template: text, cidrs: "10.88.1.0", refused: errdefs.IsInvalidArgument},
		{name: "bad template", template: "{{.NoSuch}}", cidrs: "10.88.1.0/24", refused: errdefs.IsFailedPrecondition},
		{name: "not a configuration", template: "hello", cidrs: "10.88.1.0/24", refused: errdefs.IsFailedPrecondition},
		{name: "no template", cidrs: "10.88.1.0/24"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			if c.template != "" {
				h.conf.ConfTemplate = filepath.Join(h.root, "template")
				mustDo(t, os.WriteFile(h.conf.ConfTemplate, []byte(c.template), 0o644))
			}
			mustDo(t, os.RemoveAll(h.conf.ConfDir))
			h.open()
			err := h.net.UpdatePodCIDR(t.Context(), c.cidrs)
			if (c.refused == nil && err != nil) || (c.refused != nil && !c.refused(err)) {
				t.Fatalf("update: %v", err)
			}
			got, err := os.ReadFile(filepath.Join(h.conf.ConfDir, "10-containerd-net.conflist"))
			if (c.want == "") != (err != nil) || !strings.Contains(string(got), c.want) {
				t.Errorf("wrote %q, %v, want %q in it", got, err, c.want)
			}
			if c.want != "" {
				eventually(t, "ready", func() bool { return h.net.Ready(t.Context()) == nil })
			}
		})
	}
}

// TestUpdatePodCIDRKeepsConf leaves a configuration alone that is there.
func TestUpdatePodCIDRKeepsConf(t *testing.T) {
	h := newHost(t)
	h.conf.ConfTemplate = filepath.Join(h.root, "no such file")
	h.good()
	h.open()
	mustDo(t, h.net.UpdatePodCIDR(t.Context(), "10.88.1.0/24"))
	files, err := os.ReadDir(h.conf.ConfDir)
	mustDo(t, err)
	if len(files) != 1 {
		t.Errorf("files %v", files)
	}
}
