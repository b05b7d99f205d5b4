package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// Features asks the runtime what it can do. NotFound says that there is none.
func Features(ctx context.Context, o *options.Options) (*features.Features, error) {
	name := o.GetBinaryName()
	if name == "" {
		name = runc.DefaultCommand
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("find OCI runtime: %w: %w", errdefs.ErrNotFound, err)
	}
	out, err := exec.CommandContext(ctx, path, "features").Output()
	if err != nil {
		return nil, fmt.Errorf("ask OCI runtime for its features: %w", err)
	}
	var f features.Features
	if err := json.Unmarshal(out, &f); err != nil {
		return nil, fmt.Errorf("read the features of the OCI runtime: %w: %w", errdefs.ErrDataLoss, err)
	}
	return &f, nil
}
