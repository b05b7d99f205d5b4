package lifecycle

import (
	"fmt"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// TestRTH_11_StockSupervisorCrash: under stock containerd, to which a shim that died is the
// end of its pods, nothing goes on when the supervisor was killed, nothing is left of what
// is removed, and new pods run.
func TestRTH_11_StockSupervisorCrash(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Stock(), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "pinned", daemon.Config{"runtime_type": "io.containerd.gantry.v2", "sandboxer": "shim", "disable_pause_image_pull": true})
	}))
	ref := images.Serve(t).Push(t, "app:v1", images.MustBuild(images.Spec{}))
	if _, err := d.Images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	for i, pids := range []cri.NamespaceMode{cri.NamespaceMode_CONTAINER, cri.NamespaceMode_POD} {
		o := &cri.NamespaceOption{Pid: pids}
		p := pinnedPod(d, fmt.Sprint("crashes-", i), withNamespaces(o))
		ctr := p.run(d, inNamespaces(daemon.ContainerConfig("main", ref), o))
		pid := pidOf(t, d, ctr)
		for _, s := range supervisors(t, d) {
			kill(t, s)
		}
		if s := waitExited(t, d, ctr); s.ExitCode == 0 {
			t.Errorf("status is %v", s)
		}
		waitGone(t, pid)
		// Until it has seen to the end of the shim it asks the dead one, and so may a removal.
		eventually(t, soon, func() error {
			s, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
			if err == nil && s.Status.State != cri.PodSandboxState_SANDBOX_NOTREADY {
				err = fmt.Errorf("the pod is %s", s.Status.State)
			}
			return err
		})
		eventually(t, soon, func() error { return removePod(d, p.id) })
		noSupervisor(t, d)
	}
}
