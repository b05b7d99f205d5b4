package oci

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
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

const (
	// maxFilters bounds the memory that filters take: one has some 10 KiB.
	maxFilters = 64
	// filterAge is how long one is used: libseccomp may be another by then, and know
	// more.
	filterAge = time.Hour
)

// Filters are seccomp filters that crun has compiled: to do that takes as long as the
// rest of what crun does for a container. They are learned from what crun leaves behind.
// A later crun that keeps filters by itself is left alone, and so is every other program:
// a wrapper may change the profile before crun reads it.
//
// The zero value has none. It is safe for concurrent use.
type Filters struct {
	mu       sync.Mutex
	compiled map[filterKey]filter
}

type filter struct {
	code string // in base64
	at   time.Time
}

type filterKey struct {
	by      program
	profile [sha256.Size]byte
}

// give puts into a bundle's specification the filter that crun has compiled for the same
// profile before. Where there is none, keep takes what it has compiled out of the
// directory that it keeps the container in. Nothing here is a reason to fail: without a
// filter crun compiles one. root is where crun keeps all containers.
func (f *Filters) give(name, root, bundle string) (keep func(dir string)) {
	nothing := func(string) {}
	if f == nil {
		return nothing
	}
	file, by, ok := openCrun(name)
	if ok {
		file.Close()
	}
	if own, _ := filepath.Glob(filepath.Join(root, ownCache)); !ok || len(own) > 0 {
		return nothing
	}
	keep = func(dir string) { f.keep(by, dir) }
	spec, profile, ok := profileOf(bundle)
	if !ok {
		return nothing
	}
	f.mu.Lock()
	had, ok := f.compiled[filterKey{by, profile}]
	f.mu.Unlock()
	if !ok || time.Since(had.at) > filterAge {
		return keep
	}
	if spec, err := annotate(spec, had.code); err == nil {
		_ = replace(filepath.Join(bundle, specFile), spec)
	}
	return nothing
}

// ownCache is where crun keeps filters by itself, if it does.
const ownCache = ".cache/seccomp/*"

// keep goes by the copy of the specification that crun has left, which is what it has
// compiled.
func (f *Filters) keep(by program, dir string) {
	b, err := os.ReadFile(filepath.Join(dir, filterFile))
	if err != nil || len(b) == 0 || len(b)%filterStep != 0 {
		return
	}
	_, profile, ok := profileOf(dir)
	if !ok {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.compiled == nil || len(f.compiled) >= maxFilters {
		f.compiled = map[filterKey]filter{}
	}
	f.compiled[filterKey{by, profile}] = filter{base64.StdEncoding.EncodeToString(b), time.Now()}
}

// filterStep is the size of an instruction of a filter, struct sock_filter.
const filterStep = 8

// specFile is a bundle's specification.
const specFile = "config.json"

// profileOf reads the specification in a directory and returns the digest of its seccomp
// profile. It is not ok where the filter depends on more than that.
func profileOf(dir string) (spec []byte, digest [sha256.Size]byte, ok bool) {
	spec, err := os.ReadFile(filepath.Join(dir, specFile))
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
	if s == nil { // "null"
		return nil, errors.New("the specification is empty")
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
