package oci

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const filterSpec = `{"ociVersion":"1.0.2","annotations":{"a":"<b>"},"process":{"env":["x=\u00e9"],"user":{"uid":4294967295}},"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ERRNO"}}}`

// crun is a bundle, a directory as crun keeps one below root, and a program.
type crun struct{ bundle, root, dir, program string }

const crunText = "\x7fELF and so on"

func newCrun(t *testing.T, spec string) crun {
	t.Helper()
	root := t.TempDir()
	c := crun{t.TempDir(), root, filepath.Join(root, "a"), filepath.Join(t.TempDir(), "crun")}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c.put(t, filepath.Join(c.bundle, "config.json"), spec)
	c.put(t, c.program, crunText)
	return c
}

func (c crun) put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (c crun) spec(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// create does what Create does around crun, and tells whether crun had a filter.
func (c crun) create(t *testing.T, f *Filters, spec string) bool {
	t.Helper()
	c.put(t, filepath.Join(c.bundle, "config.json"), spec)
	keep := f.give(c.program, c.root, c.bundle)
	c.put(t, filepath.Join(c.dir, "config.json"), c.spec(t))
	has := strings.Contains(c.spec(t), `"run.oci.seccomp_bpf_data":"ZmlsdGVyZWQ="`)
	c.put(t, filepath.Join(c.dir, "seccomp.bpf"), "filtered")
	keep(c.dir)
	return has
}

func TestFilters(t *testing.T) {
	var f Filters
	c := newCrun(t, filterSpec)
	if c.create(t, &f, filterSpec) || !c.create(t, &f, filterSpec) {
		t.Fatal("a filter is there before it was compiled, or not afterwards")
	}
	var before, after map[string]any
	if err := json.Unmarshal([]byte(filterSpec), &before); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(c.spec(t)), &after); err != nil {
		t.Fatal(err)
	}
	annotations := after["annotations"].(map[string]any)
	delete(annotations, filterAnnotation)
	was, _ := json.Marshal(before)
	is, _ := json.Marshal(after)
	if string(was) != string(is) || !strings.Contains(c.spec(t), "4294967295") {
		t.Errorf("%s has become %s", was, is)
	}
	for name, spec := range map[string]string{
		"another profile": strings.Replace(filterSpec, "ERRNO", "KILL", 1),
		"flags":           strings.Replace(filterSpec, `"SCMP_ACT_ERRNO"`, `"SCMP_ACT_ERRNO","flags":["SECCOMP_FILTER_FLAG_LOG"]`, 1),
		"a listener":      strings.Replace(filterSpec, `"SCMP_ACT_ERRNO"`, `"SCMP_ACT_ERRNO","listenerPath":"/x"`, 1),
		"a wish":          strings.Replace(filterSpec, `"a"`, `"run.oci.seccomp_fail_unknown_syscall"`, 1),
		"no profile":      `{"annotations":{"a":"b"},"linux":{}}`,
		"null":            `{"annotations":null,"linux":{"seccomp":null}}`,
		"not JSON":        `{`,
	} {
		if c.create(t, &f, spec) {
			t.Errorf("%s: it is given the filter", name)
		}
		if name != "another profile" && c.create(t, &f, spec) {
			t.Errorf("%s: it is given a filter", name)
		}
		if got := c.spec(t); name != "another profile" && got != spec {
			t.Errorf("%s: %s", name, got)
		}
	}
	if !c.create(t, &f, strings.Replace(filterSpec, `{"a":"<b>"}`, "null", 1)) {
		t.Error("with no annotations it is given no filter")
	}
	for key, had := range f.compiled {
		had.at = had.at.Add(-2 * filterAge)
		f.compiled[key] = had
	}
	if c.create(t, &f, filterSpec) || !c.create(t, &f, filterSpec) {
		t.Error("an old filter is given, or is not made anew")
	}
	// What crun has read is what counts, and not what it was to read.
	looser := strings.Replace(filterSpec, "ERRNO", "LOG", 1)
	c.put(t, filepath.Join(c.bundle, "config.json"), looser)
	keep := f.give(c.program, c.root, c.bundle)
	c.put(t, filepath.Join(c.dir, "config.json"), filterSpec)
	keep(c.dir)
	if c.create(t, &f, looser) {
		t.Error("the filter of another profile is given")
	}
	c.put(t, c.program, crunText+", another version")
	if c.create(t, &f, filterSpec) {
		t.Error("another program is given the filter")
	}
}

func TestFiltersOfNobody(t *testing.T) {
	var f Filters
	c := newCrun(t, filterSpec)
	for range 2 { // as runc, it leaves nothing
		f.give(c.program, c.root, c.bundle)(c.dir)
	}
	c.put(t, filepath.Join(c.dir, "config.json"), filterSpec)
	c.put(t, filepath.Join(c.dir, "seccomp.bpf"), "odd")
	f.give(c.program, c.root, c.bundle)(c.dir)
	f.give(filepath.Join(c.dir, "absent"), c.root, c.bundle)(c.dir)
	var none *Filters
	none.give(c.program, c.root, c.bundle)(c.dir)
	// A wrapper may change what it is told, and a later crun needs no help.
	c.put(t, filepath.Join(c.dir, "seccomp.bpf"), "filtered")
	script, other := filepath.Join(t.TempDir(), "crun"), filepath.Join(t.TempDir(), "wrapper")
	c.put(t, script, "#!/bin/sh\n")
	c.put(t, other, crunText)
	for _, program := range []string{script, other} {
		f.give(program, c.root, c.bundle)(c.dir)
	}
	cache := filepath.Join(c.root, ".cache", "seccomp")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	c.put(t, filepath.Join(cache, "0123"), "filtered")
	f.give(c.program, c.root, c.bundle)(c.dir)
	if c.spec(t) != filterSpec || len(f.compiled) != 0 {
		t.Errorf("%d filters, %s", len(f.compiled), c.spec(t))
	}
	if err := os.RemoveAll(cache); err != nil {
		t.Fatal(err)
	}
	// There is an end to what is kept.
	for i := range maxFilters + 9 {
		c.create(t, &f, strings.Replace(filterSpec, "<b>", strings.Repeat("x", i), 1))
		c.create(t, &f, strings.Replace(filterSpec, "ERRNO", strings.Repeat("X", i), 1))
	}
	if n := len(f.compiled); n > maxFilters {
		t.Errorf("%d filters are kept", n)
	}
}

func FuzzAnnotate(f *testing.F) {
	f.Add([]byte(filterSpec))
	f.Add([]byte(`{"annotations":null}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, spec []byte) {
		out, err := annotate(spec, "eA==")
		if err != nil {
			return
		}
		var s map[string]json.RawMessage
		var annotations map[string]string
		if err := json.Unmarshal(out, &s); err != nil || json.Unmarshal(s["annotations"], &annotations) != nil || annotations[filterAnnotation] != "eA==" {
			t.Errorf("%s becomes %s: %v", spec, out, err)
		}
	})
}
