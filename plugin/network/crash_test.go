package network_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/gantry-cri/gantry/plugin/network"
)

// crashMain is a daemon that attaches and detaches pods until it is killed.
func crashMain(config string) {
	var c network.Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		panic(err)
	}
	n, err := network.New(c)
	if err != nil {
		panic(err)
	}
	fmt.Println("running")
	ctx := context.Background()
	for i := 0; ; i++ {
		a := pod(fmt.Sprintf("p%d-%d", os.Getpid(), i))
		ns, err := n.CreateNS(ctx, a.ID)
		if err != nil {
			panic(err)
		}
		if _, err := n.Attach(ctx, a, ns); err != nil {
			panic(err)
		}
		if err := n.Detach(ctx, a); err != nil {
			panic(err)
		}
	}
}

// TestKilledDaemon kills a busy daemon at random moments; what the next one
// collects must leave nothing.
func TestKilledDaemon(t *testing.T) {
	h := newHost(t)
	h.write("10-test.conflist", h.bridgeConf())
	config, err := json.Marshal(h.conf)
	mustDo(t, err)
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for i := range rounds {
		after := time.Duration(rand.IntN(250)) * time.Millisecond
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), crashEnv+"="+string(config))
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		mustDo(t, err)
		mustDo(t, c.Start())
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		timer := time.NewTimer(after) // the moment is what is random here
		<-timer.C
		mustDo(t, c.Process.Kill())
		_ = c.Wait() // killed
		n, err := network.New(h.conf)
		mustDo(t, err)
		mustDo(t, n.GC(t.Context(), func(context.Context) ([]string, error) { return nil, nil }))
		if held := h.held(); len(held) > 0 {
			t.Fatalf("round %d, killed after %s: left %v", i, after, held)
		}
	}
}
