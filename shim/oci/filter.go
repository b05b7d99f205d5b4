package oci

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// filterFile is where crun keeps a container's seccomp filter, compiled, for the
	// commands that are executed in it later.
	filterFile = "seccomp.bpf"
	// filterAnnotation has crun take a filter, in base64, and compile none.
	// Source: crun(1).
	filterAnnotation = "run.oci.seccomp_bpf_data"
	// seccompAnnotations are what crun reads about filters.
	seccompAnnotations = "run.oci.seccomp"
)

// maxFilters bounds the memory that filters take: one has some 10 KiB.
const maxFilters = 64

// Filters are seccomp filters that crun has compiled: to do that takes as long as the
// rest of what crun does for a container. They are learned from what crun leaves behind,
// so a runtime that leaves none, as runc, is not touched.
//
// The zero value has none. It is safe for concurrent use.
type Filters struct {
	mu       sync.Mutex
	compiled map[filterKey]string // in base64
}

type filterKey struct {
	by      program
	profile [sha256.Size]byte
}

// program is a file that is executed, as it is now.
type program struct {
	dev, ino uint64
	size     int64
	changed  time.Time
}

// programOf finds the runtime's program.
func programOf(name string) (program, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return program{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return program{}, fmt.Errorf("look at %s: %w", path, err)
	}
	return program{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, changed: time.Unix(st.Ctim.Unix())}, nil
}

// give puts into a bundle's specification the filter that the program has compiled for
// the same profile before. Where there is none, keep takes what the program has compiled
// out of the directory that it keeps the container in. Nothing here is a reason to fail:
// without a filter the program compiles one.
func (f *Filters) give(name, bundle string) (keep func(dir string)) {
	nothing := func(string) {}
	by, err := programOf(name)
	if f == nil || err != nil { // the runtime's own error will tell
		return nothing
	}
	keep = func(dir string) { f.keep(by, bundle, dir) }
	if !f.knows(by) {
		return keep
	}
	spec, profile, ok := profileOf(bundle)
	if !ok {
		return nothing
	}
	f.mu.Lock()
	compiled, ok := f.compiled[filterKey{by, profile}]
	f.mu.Unlock()
	if !ok {
		return keep
	}
	if spec, err = annotate(spec, compiled); err == nil {
		_ = replace(filepath.Join(bundle, specFile), spec)
	}
	return nothing
}

func (f *Filters) knows(by program) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k := range f.compiled {
		if k.by == by {
			return true
		}
	}
	return false
}

func (f *Filters) keep(by program, bundle, dir string) {
	b, err := os.ReadFile(filepath.Join(dir, filterFile))
	if err != nil || len(b) == 0 || len(b)%filterStep != 0 {
		return
	}
	_, profile, ok := profileOf(bundle)
	if !ok {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.compiled == nil || len(f.compiled) >= maxFilters {
		f.compiled = map[filterKey]string{}
	}
	f.compiled[filterKey{by, profile}] = base64.StdEncoding.EncodeToString(b)
}

// filterStep is the size of an instruction of a filter, struct sock_filter.
const filterStep = 8

// specFile is a bundle's specification.
const specFile = "config.json"

// profileOf reads a bundle's specification and returns the digest of its seccomp
// profile. It is not ok where the filter depends on more than that.
func profileOf(bundle string) (spec []byte, digest [sha256.Size]byte, ok bool) {
	spec, err := os.ReadFile(filepath.Join(bundle, specFile))
	if err != nil {
		return nil, digest, false
	}
	var s struct {
		Annotations map[string]string
		Linux       struct{ Seccomp json.RawMessage }
	}
	if json.Unmarshal(spec, &s) != nil || len(s.Linux.Seccomp) == 0 {
		return nil, digest, false
	}
	for name := range s.Annotations {
		if strings.HasPrefix(name, seccompAnnotations) {
			return nil, digest, false
		}
	}
	var p *specs.LinuxSeccomp
	if json.Unmarshal(s.Linux.Seccomp, &p) != nil || p == nil || p.ListenerPath != "" || len(p.Flags) > 0 {
		return nil, digest, false
	}
	return spec, sha256.Sum256(s.Linux.Seccomp), true
}

// annotate adds the filter to a specification, and leaves the rest as it is.
func annotate(spec []byte, compiled string) ([]byte, error) {
	var s map[string]json.RawMessage
	if err := json.Unmarshal(spec, &s); err != nil {
		return nil, err
	}
	annotations := map[string]string{}
	if a, ok := s["annotations"]; ok {
		if err := json.Unmarshal(a, &annotations); err != nil {
			return nil, err
		}
	}
	if annotations == nil { // "null"
		annotations = map[string]string{}
	}
	annotations[filterAnnotation] = compiled
	a, err := json.Marshal(annotations)
	if err != nil {
		return nil, err
	}
	s["annotations"] = a
	return json.Marshal(s)
}

// replace writes a file that is whole at any time.
func replace(path string, content []byte) error {
	next := path + ".next"
	if err := os.WriteFile(next, content, 0o600); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return os.Rename(next, path)
}
