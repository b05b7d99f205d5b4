// Command containerd-shim-gantry-v2 runs containers for containerd as
// runtime_type = "io.containerd.gantry.v2", with one supervisor for all of them.
package main

import (
	"context"

	"github.com/gantry-cri/gantry/shim/bootstrap"
)

func main() { bootstrap.Main(context.Background()) }
