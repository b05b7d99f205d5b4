package handler

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	apitypes "github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/plugin/advisory"
)

// probeTimeout bounds the wait for one runtime's answer.
const probeTimeout = 10 * time.Second

// featuresURL is the name under which shims send what the OCI runtime's
// features command printed.
const featuresURL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// runcVersion is the annotation of the features in which runc tells its version.
const runcVersion = "org.opencontainers.runc.version"

// Features are what a runtime can do on this machine.
type Features struct {
	// Known says that the runtime answered; if not, all else is zero because
	// nobody knows.
	Known bool
	// RecursiveReadOnlyMounts needs the kernel as well.
	RecursiveReadOnlyMounts bool
	// UserNamespaces for pods, which need ID-mapped mounts too, of the runtime
	// and of the handler's snapshotter.
	UserNamespaces bool
	// IDMapMounts are mounts that show other owners.
	IDMapMounts bool
	// SeccompNotify are seccomp filters that tell of calls.
	SeccompNotify bool
	// OCIVersionMax is the newest specification that the runtime accepts, ""
	// if it does not say.
	OCIVersionMax string
	// RuncVersion is that of the runc which the runtime is, "" if it does not say
	// that it is one.
	RuncVersion string
}

// Prober asks a runtime about itself.
type Prober interface {
	// Info runs the named runtime, as containerd names it, with these options,
	// nil for none.
	Info(ctx context.Context, runtime string, options typeurl.Any) (*apitypes.RuntimeInfo, error)
}

// Introspector is containerd's task manager, or whatever stands in for it.
type Introspector interface {
	PluginInfo(ctx context.Context, request any) (any, error)
}

// NewProber asks runtimes through containerd.
func NewProber(i Introspector) Prober { return prober{i} }

type prober struct{ i Introspector }

func (p prober) Info(ctx context.Context, runtime string, options typeurl.Any) (*apitypes.RuntimeInfo, error) {
	req := &apitypes.RuntimeRequest{RuntimePath: runtime}
	if options != nil {
		req.Options = typeurl.MarshalProto(options)
	}
	answer, err := p.i.PluginInfo(ctx, req)
	if err != nil {
		return nil, err
	}
	info, ok := answer.(*apitypes.RuntimeInfo)
	if !ok {
		return nil, fmt.Errorf("the answer is a %T: %w", answer, errdefs.ErrUnknown)
	}
	return info, nil
}

// Probe asks every runtime that somebody asked for and that has not answered yet, all at once, those again
// that failed before. What goes wrong is logged and kept for ProbeError; the
// only error is the end of ctx.
func (hs *Handlers) Probe(ctx context.Context) error {
	hs.forgetFailures()
	var g errgroup.Group
	for _, name := range hs.names() {
		if name == hs.implied {
			continue
		}
		g.Go(func() error { return hs.probe(ctx, name) })
	}
	return g.Wait()
}

// ProbeError returns why the features of the named handler are not known, nil
// if they are or if nobody asked yet.
func (hs *Handlers) ProbeError(name string) error {
	if name == "" {
		name = hs.def
	}
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	return hs.probed[name].err
}

// Problems returns the handlers with a ProbeError.
func (hs *Handlers) Problems() map[string]error {
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	out := map[string]error{}
	for name, p := range hs.probed {
		if p.err != nil {
			out[name] = p.err
		}
	}
	return out
}

// Weaknesses returns, by handler, what is known against the runtimes that told
// their versions, the worst first.
func (hs *Handlers) Weaknesses() map[string][]string {
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	out := map[string][]string{}
	for name, p := range hs.probed {
		if found := p.features.weaknesses(); len(found) > 0 {
			out[name] = found
		}
	}
	return out
}

func (f Features) weaknesses() (found []string) {
	v := advisory.Find(f.RuncVersion)
	if v == nil {
		return nil
	}
	unless := ""
	if advisory.Patched(v) {
		unless = ", unless the distribution corrected it under the old number"
	}
	for _, a := range advisory.Runc(v) {
		found = append(found, fmt.Sprintf("runc %s: %s%s", v, a, unless))
	}
	return found
}

// probe makes sure that the named handler's runtime was asked. Callers at the
// same time wait for one answer; the error is the end of ctx.
func (hs *Handlers) probe(ctx context.Context, name string) error {
	if _, ok := hs.answer(name); ok {
		return nil
	}
	_, err := hs.probes.Do(ctx, name, func(ctx context.Context) (Features, error) {
		if p, ok := hs.answer(name); ok {
			return p.features, p.err
		}
		p := hs.ask(ctx, hs.byName[name])
		if p.err != nil {
			log.G(ctx).WithError(p.err).WithField("handler", name).Warn("Features of a runtime handler are not known")
		}
		for _, w := range p.features.weaknesses() {
			log.G(ctx).WithField("handler", name).Warn("Known weakness of " + w)
		}
		hs.mu.Lock()
		defer hs.mu.Unlock()
		hs.probed[name] = p
		return p.features, p.err
	})
	if _, ok := hs.answer(name); ok {
		return nil
	}
	return err
}

// ask runs a handler's runtime. The time it may take does not depend on who
// asked first.
func (hs *Handlers) ask(ctx context.Context, h Handler) (p probed) {
	defer func() {
		if r := recover(); r != nil {
			p = probed{err: fmt.Errorf("ask runtime %s: panic: %v", h.Runtime, r)}
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var options typeurl.Any
	if h.OptionsType != "" {
		options = &anypb.Any{TypeUrl: h.OptionsType, Value: h.Options}
	}
	info, err := hs.prober.Info(ctx, h.Runtime, options)
	if err != nil {
		return probed{err: fmt.Errorf("ask runtime %s: %w", h.Runtime, err)}
	}
	f, err := parseFeatures(info, kernelRRO())
	if err != nil {
		return probed{err: fmt.Errorf("read features of runtime %s: %w", h.Runtime, err)}
	}
	f.UserNamespaces = f.UserNamespaces && hs.obstacle(h.Snapshotter) == nil
	return probed{features: f}
}

func (hs *Handlers) answer(name string) (probed, bool) {
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	p, ok := hs.probed[name]
	return p, ok
}

func (hs *Handlers) forgetFailures() {
	for _, name := range hs.names() {
		hs.forgetFailure(name)
	}
}

// forgetFailure makes the next probe of a handler that failed ask again.
func (hs *Handlers) forgetFailure(name string) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if hs.probed[name].err != nil {
		delete(hs.probed, name)
	}
}

func (hs *Handlers) withFeatures(h Handler) Handler {
	p, _ := hs.answer(h.Name)
	h.Features = p.features
	return h
}

// parseFeatures reads an answer. A runtime that sends no features of a kind
// that is understood here has said nothing, which is not an error.
func parseFeatures(info *apitypes.RuntimeInfo, kernelRRO bool) (Features, error) {
	if info.GetFeatures().GetTypeUrl() != featuresURL {
		return Features{}, nil
	}
	var f features.Features
	if err := json.Unmarshal(info.GetFeatures().GetValue(), &f); err != nil {
		return Features{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	out := Features{
		Known:                   true,
		RecursiveReadOnlyMounts: kernelRRO && slices.Contains(f.MountOptions, "rro"),
		OCIVersionMax:           f.OCIVersionMax,
		RuncVersion:             f.Annotations[runcVersion],
	}
	if f.Linux == nil {
		return out, nil
	}
	if m := f.Linux.MountExtensions; m != nil && m.IDMap != nil && m.IDMap.Enabled != nil {
		out.IDMapMounts = *m.IDMap.Enabled
	}
	out.SeccompNotify = f.Linux.Seccomp != nil && slices.Contains(f.Linux.Seccomp.Actions, string(specs.ActNotify))
	out.UserNamespaces = out.IDMapMounts && slices.Contains(f.Linux.Namespaces, "user")
	return out, nil
}

// kernelRRO reports whether the kernel can make whole mount trees read-only:
// whether it has mount_setattr(2). The call names nothing and changes nothing.
var kernelRRO = sync.OnceValue(func() bool {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM)
})
