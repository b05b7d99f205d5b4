// Package handler resolves runtime handlers: what the configuration says about
// each, made ready for use, and what its runtime says it can do.
//
// New does everything that can fail for the configuration's sake, so that a
// handler that was accepted can be looked up for ever. It runs no runtime: that
// happens once per handler, when Probe is called or Resolve needs the answer,
// and a runtime that is missing or does not answer costs its features, never
// the daemon. The package starts no pod and knows no runtime by name beyond the
// type of its options.
//
// Start reading at Handlers; options.go has the encoding of options, probe.go
// the features.
package handler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/flight"
	"github.com/gantry-cri/gantry/plugin/record"
)

// Handler is a runtime handler ready for use. It is shared: read only.
type Handler struct {
	// Handler is what is kept with every pod. Its Snapshotter is "" for the
	// image service's default.
	record.Handler
	// BaseSpec is where every specification starts from, nil for ours.
	BaseSpec *specs.Spec
	// SeccompProfile is the file of the default profile, "" for the node's.
	SeccompProfile string
	// PodAnnotations and ContainerAnnotations are path.Match patterns of the
	// annotations that reach the runtime.
	PodAnnotations, ContainerAnnotations []string
	// AllowedAnnotations are names of those that have an effect here.
	AllowedAnnotations []string

	PrivilegedWithoutHostDevices                  bool
	PrivilegedWithoutHostDevicesAllDevicesAllowed bool
	CgroupWritable                                bool
	// DefaultAnnotations reach the runtime unless the request has its own.
	DefaultAnnotations map[string]string
	// CreateTimeout bounds the making of a task, 0 for the usual time.
	CreateTimeout time.Duration

	// SELinuxKVM gives the pods the label of virtual machines.
	SELinuxKVM bool

	// CNIConfDir is "" for the node's network; CNIMaxConfNum goes with it.
	CNIConfDir    string
	CNIMaxConfNum int

	IOType config.IOType
	// SystemdCgroup says that the runtime puts cgroups in systemd's hands.
	SystemdCgroup bool
	// Features are zero until the runtime was probed, and if that failed.
	Features Features

	// platformPaths are paths of the OCI runtime by the platform of the image.
	platformPaths map[string]string
	// tellsDriver says that SystemdCgroup is the configuration's answer and
	// not just false for want of one.
	tellsDriver bool
}

// Handlers are the configured runtime handlers.
type Handlers struct {
	byName map[string]Handler
	def    string
	prober Prober
	// obstacle is why no pod with the snapshotter can have a user namespace.
	obstacle func(snapshotter string) error
	// booted reports whether systemd runs the machine.
	booted func() bool

	probes flight.Group[string, Features]

	// implied is a handler that nobody asked for, "" for none. Its runtime is asked
	// when a pod has it, as it need not be there.
	implied string

	mu     sync.RWMutex
	probed map[string]probed
}

type probed struct {
	features Features
	err      error
}

// New resolves every configured handler. obstacle says why, whatever its
// runtime can do, no pod can have a user namespace of its own whose images are
// in the named snapshotter, "" being the image service's default; nil is that
// it can.
func New(cfg config.Runtime, p Prober, obstacle func(snapshotter string) error) (*Handlers, error) {
	return build(cfg, p, obstacle, cgroups.Mode() == cgroups.Unified)
}

func build(cfg config.Runtime, p Prober, obstacle func(string) error, unified bool) (*Handlers, error) {
	hs := &Handlers{
		byName: map[string]Handler{}, def: cfg.DefaultHandler, prober: p, obstacle: obstacle, booted: runningSystemd,
		probes: flight.Group[string, Features]{Linger: flight.Forever}, probed: map[string]probed{},
	}
	loaded := specFiles{}
	for _, name := range slices.Sorted(maps.Keys(cfg.Handlers)) {
		c := cfg.Handlers[name]
		if c.CgroupWritable && !unified {
			return nil, fmt.Errorf("resolve runtime handler %q: cgroup_writable needs cgroup v2: %w", name, errdefs.ErrFailedPrecondition)
		}
		if c.Implied {
			hs.implied = name
		}
		h, err := resolve(name, c, loaded)
		if err != nil {
			return nil, fmt.Errorf("resolve runtime handler %q: %w", name, err)
		}
		hs.byName[name] = h
	}
	if _, ok := hs.byName[hs.def]; !ok {
		return nil, fmt.Errorf("resolve runtime handlers: the default one: %w", hs.unknown(hs.def))
	}
	return hs, nil
}

func resolve(name string, c config.Handler, loaded specFiles) (Handler, error) {
	h := Handler{
		Handler: record.Handler{
			Name: name, Runtime: c.RuntimeType, Sandboxer: c.Sandboxer, Snapshotter: c.Snapshotter,
		},
		SeccompProfile:               c.SeccompProfile,
		PodAnnotations:               c.PodAnnotations,
		ContainerAnnotations:         c.ContainerAnnotations,
		AllowedAnnotations:           c.AllowedAnnotations,
		platformPaths:                c.PlatformRuntimePaths,
		PrivilegedWithoutHostDevices: c.PrivilegedWithoutHostDevices,
		PrivilegedWithoutHostDevicesAllDevicesAllowed: c.PrivilegedWithoutHostDevicesAllDevicesAllowed,
		CgroupWritable:     c.CgroupWritable,
		DefaultAnnotations: c.DefaultAnnotations,
		CreateTimeout:      c.ContainerCreateTimeout,
		SELinuxKVM:         c.SELinuxKVM,
		CNIConfDir:         c.CNIConfDir,
		CNIMaxConfNum:      c.CNIMaxConfNum,
		IOType:             c.IOType,
	}
	if c.RuntimePath != "" {
		h.Runtime = c.RuntimePath
	}
	opts, err := encodeOptions(c)
	if err != nil {
		return Handler{}, err
	}
	if opts.any != nil {
		h.OptionsType, h.Options = opts.any.GetTypeUrl(), opts.any.GetValue()
	}
	h.SystemdCgroup, h.tellsDriver = opts.systemdCgroup, opts.tellsDriver
	h.BaseSpec, err = loaded.load(c.BaseRuntimeSpec)
	return h, err
}

// Lookup returns what is kept with a pod of the named handler, "" being the
// default one. A handler that is not configured is NotFound.
func (hs *Handlers) Lookup(name string) (record.Handler, error) {
	h, err := hs.find(name)
	return h.Handler, err
}

// Get returns the handler of exactly this name with the features known so far,
// and whether it is configured. It waits for nothing.
func (hs *Handlers) Get(name string) (Handler, bool) {
	h, ok := hs.byName[name]
	if !ok {
		return Handler{}, false
	}
	return hs.withFeatures(h), true
}

// CreateTimeout returns how long a task of the handler may take to be made, 0
// for the usual time.
func (hs *Handlers) CreateTimeout(h record.Handler) time.Duration {
	return hs.byName[h.Name].CreateTimeout
}

// Resolve returns the named handler with its features, "" being the default
// one. The first call waits for the runtime to be probed; that it cannot be is
// no error, see ProbeError. A handler that is not configured is NotFound.
func (hs *Handlers) Resolve(ctx context.Context, name string) (Handler, error) {
	h, err := hs.find(name)
	if err != nil {
		return Handler{}, err
	}
	if err := hs.probe(ctx, h.Name); err != nil {
		return Handler{}, fmt.Errorf("probe runtime handler %q: %w", h.Name, err)
	}
	return hs.withFeatures(h), nil
}

// AdmitUserNS says why pods of the named handler can have no user namespace of
// their own, nil if they can. Like Resolve it waits for the runtime to be
// probed. One that could not be is asked again: the pod cannot do without the
// answer, and there may have been none for the load of the node.
func (hs *Handlers) AdmitUserNS(ctx context.Context, name string) error {
	h, err := hs.find(name)
	if err != nil {
		return err
	}
	hs.forgetFailure(h.Name)
	if h, err = hs.Resolve(ctx, h.Name); err != nil || h.Features.UserNamespaces {
		return err
	}
	var class error = errdefs.ErrFailedPrecondition
	why := hs.obstacle(h.Snapshotter)
	if why == nil {
		if why = hs.ProbeError(h.Name); why != nil {
			class = errdefs.ErrUnavailable
		}
	}
	if why == nil {
		why = errors.New("its runtime does not offer user namespaces with id-mapped mounts")
	}
	return fmt.Errorf("user namespace: runtime handler %q cannot give a pod one: %w (%w)", h.Name, why, class)
}

// Default returns the default handler with the features known so far.
func (hs *Handlers) Default() Handler { return hs.withFeatures(hs.byName[hs.def]) }

// List returns the handlers with the features known so far: first the default
// one under the name "", then all by name.
func (hs *Handlers) List() []Handler {
	def := hs.Default()
	def.Name = ""
	out := []Handler{def}
	for _, name := range hs.names() {
		out = append(out, hs.withFeatures(hs.byName[name]))
	}
	return out
}

// CRI returns List as the CRI's Status has it.
func (hs *Handlers) CRI() []*cri.RuntimeHandler {
	var out []*cri.RuntimeHandler
	for _, h := range hs.List() {
		r := &cri.RuntimeHandler{Name: h.Name}
		if h.Features.Known {
			r.Features = &cri.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: h.Features.RecursiveReadOnlyMounts,
				UserNamespaces:          h.Features.UserNamespaces,
			}
		}
		out = append(out, r)
	}
	return out
}

// SystemdCgroup reports whether pods of the default handler have their cgroups
// made by systemd. A runtime without such an option says nothing; then another
// handler's answer is taken, in the order of names, or else what runs the
// machine.
func (hs *Handlers) SystemdCgroup() bool {
	for _, name := range append([]string{hs.def}, hs.names()...) {
		if h := hs.byName[name]; h.tellsDriver {
			return h.SystemdCgroup
		}
	}
	return hs.booted()
}

// CgroupDriver returns SystemdCgroup in the CRI's words.
func (hs *Handlers) CgroupDriver() cri.CgroupDriver {
	if hs.SystemdCgroup() {
		return cri.CgroupDriver_SYSTEMD
	}
	return cri.CgroupDriver_CGROUPFS
}

func (hs *Handlers) find(name string) (Handler, error) {
	if name == "" {
		name = hs.def
	}
	h, ok := hs.byName[name]
	if !ok {
		return Handler{}, hs.unknown(name)
	}
	return h, nil
}

func (hs *Handlers) names() []string { return slices.Sorted(maps.Keys(hs.byName)) }

func (hs *Handlers) unknown(name string) error {
	return fmt.Errorf("runtime handler %.256q is not configured; configured: %s: %w",
		name, strings.Join(hs.names(), ", "), errdefs.ErrNotFound)
}

func runningSystemd() bool {
	fi, err := os.Lstat("/run/systemd/system")
	return err == nil && fi.IsDir()
}
