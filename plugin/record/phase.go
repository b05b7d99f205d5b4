package record

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Phase is where a sandbox stands. Only these three are ever stored.
type Phase string

const (
	// Creating: the intent is recorded, effects may or may not exist.
	Creating Phase = "creating"
	// Ready: everything is in place; containers may be created.
	Ready Phase = "ready"
	// NotReady: stopped, died, or failed to start with something left to
	// release. No container may be created; Stop and Remove finish it.
	NotReady Phase = "notready"
)

// Event is something that happens to a sandbox.
type Event string

const (
	// Started: every effect of a start succeeded.
	Started Event = "started"
	// Stopped: a stop was asked for, the sandbox died, or a start failed.
	Stopped Event = "stopped"
)

var sandboxMoves = map[Phase]map[Event]Phase{
	Creating: {Started: Ready, Stopped: NotReady},
	Ready:    {Stopped: NotReady},
	NotReady: {Stopped: NotReady},
}

// Next returns the phase that e leads to, or FailedPrecondition.
func (p Phase) Next(e Event) (Phase, error) {
	if n, ok := sandboxMoves[p][e]; ok {
		return n, nil
	}
	return p, fmt.Errorf("sandbox is %s, which %q does not follow: %w", p, e, errdefs.ErrFailedPrecondition)
}

// ContainerPhase is where a container stands. The CRI's UNKNOWN is never
// stored: it is the answer when the runtime does not tell.
type ContainerPhase string

const (
	// ContainerCreating: the intent is recorded, effects may or may not exist.
	ContainerCreating ContainerPhase = "creating"
	ContainerCreated  ContainerPhase = "created"
	ContainerRunning  ContainerPhase = "running"
	ContainerExited   ContainerPhase = "exited"
)

// ContainerEvent is something that happens to a container.
type ContainerEvent string

const (
	// Prepared: root filesystem and specification exist.
	Prepared ContainerEvent = "prepared"
	// Released: the process runs.
	Released ContainerEvent = "released"
	// TakenBack: what was taken for released had not been.
	TakenBack ContainerEvent = "taken back"
	// Exited: the process ended, could not be started, or the creation failed
	// with something left to release.
	Exited ContainerEvent = "exited"
)

var containerMoves = map[ContainerPhase]map[ContainerEvent]ContainerPhase{
	ContainerCreating: {Prepared: ContainerCreated, Exited: ContainerExited},
	ContainerCreated:  {Released: ContainerRunning, Exited: ContainerExited},
	ContainerRunning:  {Released: ContainerRunning, TakenBack: ContainerCreated, Exited: ContainerExited},
	// A second report of the same exit changes nothing.
	ContainerExited: {Exited: ContainerExited},
}

// Next returns the phase that e leads to, or FailedPrecondition.
func (p ContainerPhase) Next(e ContainerEvent) (ContainerPhase, error) {
	if n, ok := containerMoves[p][e]; ok {
		return n, nil
	}
	return p, fmt.Errorf("container is %s, which %q does not follow: %w", p, e, errdefs.ErrFailedPrecondition)
}
