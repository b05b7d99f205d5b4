package handler

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/record"
)

// encoded is a handler's options as its runtime gets them.
type encoded struct {
	any           typeurl.Any // nil for no options
	systemdCgroup bool
	tellsDriver   bool
}

// encodeOptions puts a handler's options into the message of its runtime: the
// one of runc, or else the one that every other runtime takes, which names a
// file or carries the whole table.
func encodeOptions(c config.Handler) (encoded, error) {
	if c.Options == nil && !c.IsRunc() {
		return encoded{}, nil
	}
	body, err := toml.Marshal(c.Options)
	if err != nil {
		return encoded{}, fmt.Errorf("encode options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if !c.IsRunc() {
		msg := &runtimeoptions.Options{TypeUrl: text(c.Options, "TypeUrl"), ConfigPath: text(c.Options, "ConfigPath")}
		if msg.ConfigPath == "" {
			msg.ConfigBody = body
		}
		a, err := typeurl.MarshalAny(msg)
		return encoded{any: a}, err
	}
	msg := &runcoptions.Options{}
	err = toml.NewDecoder(bytes.NewReader(body)).DisallowUnknownFields().Decode(msg)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		return encoded{}, fmt.Errorf("encode options: unknown key %s: %w", strings.Join(strict.Errors[0].Key(), "."), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return encoded{}, fmt.Errorf("encode options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	a, err := typeurl.MarshalAny(msg)
	return encoded{any: a, systemdCgroup: msg.SystemdCgroup, tellsDriver: c.Options != nil}, err
}

// text reads a string from a table whose keys may be in any letter case.
func text(t map[string]any, key string) string {
	if s, ok := t[key].(string); ok {
		return s
	}
	for k, v := range t {
		if s, ok := v.(string); ok && strings.EqualFold(k, key) {
			return s
		}
	}
	return ""
}

// maxSpec is the longest base specification that is read. The default one of
// runc has 3 KiB.
const maxSpec = 4 << 20

// specFiles are the base specifications that were read, by path.
type specFiles map[string]*specs.Spec

// load reads a base specification, once. "" is none.
func (f specFiles) load(path string) (*specs.Spec, error) {
	if path == "" || f[path] != nil {
		return f[path], nil
	}
	data, err := readSpec(path)
	if err != nil {
		return nil, fmt.Errorf("read base_runtime_spec: %w", err)
	}
	spec, err := parseSpec(data)
	if err != nil {
		return nil, fmt.Errorf("read base_runtime_spec %s: %w", path, err)
	}
	f[path] = spec
	return spec, nil
}

func readSpec(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	// Opening a pipe would wait for a writer.
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file: %w", path, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err == nil && len(data) > maxSpec {
		err = fmt.Errorf("%s has more than %d bytes: %w", path, maxSpec, errdefs.ErrInvalidArgument)
	}
	return data, err
}

// parseSpec reads a specification. Like every reader of such files it leaves
// alone what it does not know: newer versions add keys.
func parseSpec(data []byte) (*specs.Spec, error) {
	var spec *specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec == nil {
		return nil, fmt.Errorf("it holds no specification: %w", errdefs.ErrInvalidArgument)
	}
	return spec, nil
}

// WithIOOwner returns h with options by which the pipes of a process belong to
// that user and group of the node: to write to its own output by name, as
// /dev/stdout, a process in a user namespace must own it. Only runc's shim has
// such options; the handler of another runtime stays as it is.
func WithIOOwner(h record.Handler, uid, gid uint32) (record.Handler, error) {
	return withOptions(h, func(o *runcoptions.Options) { o.IoUid, o.IoGid = uid, gid })
}

// For returns h as it runs containers whose image is for the platform.
func (hs *Handlers) For(h record.Handler, p imagespec.Platform) (record.Handler, error) {
	paths := hs.byName[h.Name].platformPaths
	p = platforms.Normalize(p)
	path := cmp.Or(paths[platforms.FormatAll(p)], paths[p.OS+"/"+p.Architecture])
	if path == "" {
		return h, nil
	}
	return withOptions(h, func(o *runcoptions.Options) { o.BinaryName = path })
}

// withOptions returns h with other options of runc's shim; the handler of
// another runtime stays as it is.
func withOptions(h record.Handler, change func(*runcoptions.Options)) (record.Handler, error) {
	var o runcoptions.Options
	if !typeurl.Is(&anypb.Any{TypeUrl: h.OptionsType}, &o) {
		return h, nil
	}
	if err := proto.Unmarshal(h.Options, &o); err != nil {
		return h, fmt.Errorf("decode options of runtime handler %q: %w: %w", h.Name, err, errdefs.ErrInternal)
	}
	change(&o)
	b, err := proto.Marshal(&o)
	if err != nil {
		return h, fmt.Errorf("encode options of runtime handler %q: %w: %w", h.Name, err, errdefs.ErrInternal)
	}
	h.Options = b
	return h, nil
}
