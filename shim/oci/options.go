package oci

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Options reads the options of a task: runc's own message, or the table of a
// configuration as containerd hands it to runtimes that it does not know.
func Options(a typeurl.Any) (*options.Options, error) {
	if a == nil || a.GetTypeUrl() == "" {
		return &options.Options{}, nil
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		return nil, fmt.Errorf("read options: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	switch o := v.(type) {
	case *options.Options:
		return o, nil
	case *runtimeoptions.Options:
		if o.GetConfigPath() != "" {
			return nil, fmt.Errorf("options.ConfigPath: this runtime takes its options from the table itself: %w", errdefs.ErrInvalidArgument)
		}
		return fromTable(o.GetConfigBody())
	default:
		return nil, fmt.Errorf("options are of type %s, not runc's: %w", a.GetTypeUrl(), errdefs.ErrInvalidArgument)
	}
}

// table is the options of runc as a configuration writes them.
type table struct {
	TypeURL                                  string `toml:"TypeUrl"`
	BinaryName, Root, ShimCgroup             string
	CriuImagePath, CriuWorkPath              string
	NoPivotRoot, NoNewKeyring, SystemdCgroup bool
	IoUID                                    uint32 `toml:"IoUid"`
	IoGID                                    uint32 `toml:"IoGid"`
}

func fromTable(body []byte) (*options.Options, error) {
	var t table
	if err := toml.Unmarshal(body, &t); err != nil {
		return nil, fmt.Errorf("read table of options: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	return &options.Options{
		BinaryName: t.BinaryName, Root: t.Root, ShimCgroup: t.ShimCgroup,
		CriuImagePath: t.CriuImagePath, CriuWorkPath: t.CriuWorkPath,
		NoPivotRoot: t.NoPivotRoot, NoNewKeyring: t.NoNewKeyring, SystemdCgroup: t.SystemdCgroup,
		IoUid: t.IoUID, IoGid: t.IoGID,
	}, nil
}

// optionsFile is in the bundle of a sandbox: the options that its shim was started
// with, which nobody else is told.
const optionsFile = "options"

// SaveOptions writes the options of a shim into its bundle.
func SaveOptions(bundle string, a typeurl.Any) error {
	data, err := proto.Marshal(&anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, optionsFile), data, 0o600)
}

// SavedOptions reads the options of a bundle, none where none were saved.
func SavedOptions(bundle string) (*options.Options, error) {
	data, err := os.ReadFile(filepath.Join(bundle, optionsFile))
	if errors.Is(err, os.ErrNotExist) {
		return &options.Options{}, nil
	}
	if err != nil {
		return nil, err
	}
	var a anypb.Any
	if err := proto.Unmarshal(data, &a); err != nil {
		return nil, fmt.Errorf("read saved options: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	return Options(&a)
}
