package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// gvisorConfig is what gVisor's shim reads: how to call its runtime.
const gvisorConfig = `binary_name = %q
log_path = "%s/shim-%%ID%%.log"
log_level = "warning"
[runsc_config]
platform = "systrap"
`

// TestRTH_26_GVisor: pods in gVisor's kernel, by a shim of its own. That ends with
// the first event that it cannot post, so that these pods do not survive every
// restart of the daemon.
func TestRTH_26_GVisor(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		config := filepath.Join(in.Dir, "runsc.toml")
		must(os.WriteFile(config, fmt.Appendf(nil, gvisorConfig, inBin(t, "gvisor/runsc"), in.Dir), 0o644))
		addHandler(in, c, "gvisor", daemon.Config{
			"runtime_type": "io.containerd.runsc.v1", "runtime_path": inBin(t, "gvisor/containerd-shim-runsc-v1"),
			"options": daemon.Config{"TypeUrl": "io.containerd.runsc.v1.options", "ConfigPath": config},
		})
	}))
	config := d.PodConfig("gvisor")
	inPodGroup(d, "gvisor")(config)
	p := pod{d.RunPodWith(config, "gvisor"), config}
	server := p.serve(t, d, 8080)
	if out := sh(d, server, "dmesg"); !strings.Contains(out, "gVisor") {
		t.Errorf("the kernel says %q", out)
	}
	browsed(t, address(ipOf(t, d, p), 8080))
	wholeLife(t, d, p)
	b := &box{Daemon: d, t: t, pod: p.id, config: p.config}
	if got, err := talk(b.forward(8080)[0], "GET / HTTP/1.0\r\n\r\n"); !strings.HasSuffix(got, "hello from the pod\n") || err != nil {
		t.Errorf("a forwarded port says %q, %v", got, err)
	}
	used := func() (cpu, memory uint64) {
		s := podStats(t, d, p.id).Linux
		return s.Cpu.GetUsageCoreNanoSeconds().GetValue(), s.Memory.GetWorkingSetBytes().GetValue()
	}
	before, memory := used()
	sh(d, server, spin)
	if after, _ := used(); after <= before || memory == 0 {
		t.Errorf("the pod used %d ns and then %d ns of CPU, and %d bytes", before, after, memory)
	}
	if err := removePod(d, p.id); err != nil {
		t.Error(err)
	}
}
