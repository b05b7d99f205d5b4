package container

import (
	"context"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/undo"
)

// The resources of a container besides its record and the snapshots that go with
// it, in the order in which they are acquired.
const (
	releaseVolumes = "volumes"
	releaseFiles   = "files"
	releasePlugins = "plugins"
	releaseStreams = "streams"
	releaseTask    = "task"
)

var resources = []string{releaseVolumes, releaseFiles, releasePlugins, releaseStreams, releaseTask}

// push puts the release of a resource on the stack. There is one release for
// each, whoever needs it.
func (s *Service) push(u *undo.Stack, resource string, c record.Container) {
	release := map[string]func(context.Context) error{
		releaseVolumes: func(ctx context.Context) error { return s.Volumes.Remove(ctx, c.ID) },
		releaseFiles:   func(ctx context.Context) error { return s.Files.RemoveContainer(ctx, c) },
		releasePlugins: func(ctx context.Context) error { return s.forget(ctx, c) },
		releaseStreams: func(ctx context.Context) error { return s.removeStreams(ctx, c.ID) },
		releaseTask:    func(ctx context.Context) error { return s.Tasks.Release(ctx, c) },
	}[resource]
	u.Push(resource, release)
}

func (s *Service) removeStreams(ctx context.Context, id string) error {
	if l, ok := s.lookup(id); ok {
		if stream := s.streamOf(l); stream != nil {
			if err := stream.Close(ctx); err != nil {
				return err
			}
		}
	}
	return s.Streams.Remove(ctx, id)
}

// Remove kills the container if it runs, releases everything and forgets it. An
// unknown container is removed already.
func (s *Service) Remove(ctx context.Context, id string) error {
	c, err := s.Store.Resolve(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.Stop(ctx, c.ID, 0); err != nil {
		return err
	}
	done, err := s.turns.Take(ctx, c.ID)
	if err != nil {
		return err
	}
	defer done()
	if c, err = s.Store.Get(c.ID); err != nil {
		return ignoreNotFound(err)
	}
	operation.Stage(ctx, "release container")
	u := &undo.Stack{}
	for _, r := range resources {
		s.push(u, r, c)
	}
	if err := u.Unwind(ctx); err != nil {
		return err
	}
	s.leave(c.ID)
	return s.Store.Delete(ctx, c.ID)
}
