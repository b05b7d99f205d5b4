package image

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantry-cri/gantry/plugin/undo"
)

const (
	// labelLease marks the leases of pulls, so that a start finds those a
	// crash left behind.
	labelLease = "io.gantry.image.pull"
	// leaseLife frees what a pull holds should nobody ever start again.
	leaseLife = 24 * time.Hour
)

// pullKey is what two requests must have in common to share one pull.
type pullKey struct {
	ref, snapshotter string
	platform         int
	choice           string // a platform in its place
	auth             string
}

// Pull makes the image available locally and returns its ID. Requests for the
// same image with the same credentials share one pull, which goes on for a
// while after the last of them left.
func (s *Service) Pull(ctx context.Context, r PullRequest) (string, error) {
	named, err := normalise(r.Ref)
	if err != nil {
		return "", fmt.Errorf("pull image: %w", err)
	}
	acc, err := newAccess(s.o.Registry, s.node, named, r.Auth)
	if err != nil {
		return "", fmt.Errorf("pull image %q: %w", named, err)
	}
	ctx = inNamespace(ctx)
	handler := r.handler()
	choice, err := s.choiceOf(r.Annotations, handler)
	if err != nil {
		return "", fmt.Errorf("pull image %q: %w", named, err)
	}
	key := pullKey{ref: named.String(), snapshotter: s.snapshotterOf(handler), platform: s.platforms.of(handler), choice: choice.name, auth: digestOf(r.Auth)}
	leave := s.ops.join(ctx, key)
	id, err := s.pulls.Do(ctx, key, func(ctx context.Context) (string, error) {
		return s.pull(ctx, key, pulling{named, acc, choice})
	})
	stage := leave()
	if err == nil {
		return id, nil
	}
	if _, ok := errors.AsType[*pullError](err); !ok {
		// The caller's time is up; the pull itself goes on for a while.
		return "", fmt.Errorf("pull image %q: waiting for stage %s: %w", key.ref, stage, err)
	}
	return "", err
}

// pulling is what a pull has besides its key.
type pulling struct {
	named  reference.Named
	access *access
	choice choice
}

// pull is the work itself. Its context ends when nobody waits any more.
func (s *Service) pull(ctx context.Context, key pullKey, p pulling) (id string, err error) {
	set, stage, end := s.ops.begin(key)
	defer end()
	defer p.access.traffic.close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begun := time.Now()
	id, err = s.underLease(ctx, "pull of "+key.ref, func(ctx context.Context) (string, error) {
		j := &job{s: s, named: p.named, snapshotter: key.snapshotter, platform: s.platforms.matchers[key.platform], want: s.platforms.names[key.platform], access: p.access, setStage: set}
		if p.choice.name != "" {
			j.platform, j.want, j.chosen = p.choice, p.choice.name, true
		}
		watched := make(chan struct{})
		go func() { // ends with ctx, waited for below
			defer close(watched)
			j.progress.watch(ctx, s.o.Policy.ProgressTimeout, stage, cancel)
		}()
		id, err := s.fetchAndTag(ctx, j, key)
		if err != nil {
			err = pullFailed(key.ref, err, context.Cause(ctx))
		}
		cancel(nil)
		<-watched
		return id, err
	})
	if err != nil {
		if _, ok := errors.AsType[*pullError](err); !ok {
			err = pullFailed(key.ref, err, context.Cause(ctx))
		}
		return "", err
	}
	log.G(ctx).WithFields(log.Fields{"image": key.ref, "id": id, "duration": time.Since(begun)}).Info("image pulled")
	return id, nil
}

// underLease runs fn while a lease protects what it brings in. The lease is
// gone afterwards, whatever happened. When the service stops, fn's context
// ends and the stop waits for fn under the given name.
func (s *Service) underLease(ctx context.Context, name string, fn func(context.Context) (string, error)) (string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	defer close(done)
	s.o.Group.Go(name, func(life context.Context) {
		select {
		case <-life.Done():
			cancel(context.Cause(life))
			<-done
		case <-done:
		}
	})
	var acquired undo.Stack
	defer func() {
		if err := acquired.Unwind(ctx); err != nil {
			logFailure(ctx, "clean up after a pull; the lease ends by itself", err)
		}
	}()
	var suffix [8]byte
	_, _ = rand.Read(suffix[:]) // never fails
	lease := leases.Lease{ID: "gantry-pull-" + hex.EncodeToString(suffix[:])}
	acquired.Push("lease", func(ctx context.Context) error {
		err := s.o.Leases.Delete(ctx, lease)
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
	_, err := s.o.Leases.Create(ctx, leases.WithID(lease.ID), leases.WithLabel(labelLease, "true"), leases.WithExpiration(leaseLife))
	if err != nil {
		return "", fmt.Errorf("create lease: %w", err)
	}
	return fn(leases.WithLease(ctx, lease.ID))
}

// fetchAndTag brings the image here. Writing the records is the commit: until
// then there is nothing but garbage that the lease protects.
func (s *Service) fetchAndTag(ctx context.Context, j *job, key pullKey) (string, error) {
	target, err := j.pull(ctx)
	if err != nil {
		return "", err
	}
	p, err := s.index.reader.image(ctx, target, j.platform)
	if err != nil {
		return "", atStage(stageFetch, err)
	}
	if j.chosen && p.artifact == "" && !images.IsIndexType(target.MediaType) && !j.platform.Match(p.config.Platform) {
		return "", atStage(stageFetch, notMade(j.want, []string{offer(p.config.Platform)}))
	}
	if err := s.checkUnpacked(ctx, p, key.snapshotter); err != nil {
		return "", atStage(stageUnpack, err)
	}
	j.setStage(stageTag)
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	all := names(j.named, target.Digest, p.id)
	if err := s.tag(ctx, target, key.choice, all); err != nil {
		return "", atStage(stageTag, err)
	}
	if err := s.index.refresh(ctx, all...); err != nil {
		// The image is there; the event of each record brings it in.
		logFailure(ctx, "show a pulled image", err)
	}
	return p.id, nil
}

func (s *Service) checkUnpacked(ctx context.Context, p *parsed, snapshotter string) error {
	if p.chainID == "" {
		return nil
	}
	if _, err := s.o.Snapshotters[snapshotter].Stat(ctx, p.chainID); err != nil {
		return fmt.Errorf("find unpacked image %s in %s: %w", p.id, snapshotter, err)
	}
	return nil
}

// tag writes all records, or leaves them as they were. chosen is the platform
// that the request named, "" for none.
func (s *Service) tag(ctx context.Context, target imagespec.Descriptor, chosen string, names []string) (err error) {
	var written undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, written.Unwind(ctx))
		}
	}()
	for _, name := range names {
		back, err := s.writeRecord(ctx, images.Image{Name: name, Target: target}, chosen)
		if back != nil {
			written.Push("image record "+name, back)
		}
		if err != nil {
			return fmt.Errorf("write image record %s: %w", name, err)
		}
	}
	return nil
}

// recordTries bounds the attempts to create or update a record that somebody
// else deletes and creates at the same time.
const recordTries = 5

// writeRecord makes the record what want says and returns what restores it.
func (s *Service) writeRecord(ctx context.Context, want images.Image, chosen string) (undo.Release, error) {
	var err error
	for range recordTries {
		want.Labels = labelsFor(images.Image{}, want.Target, chosen)
		if _, err = s.o.Images.Create(ctx, want); err == nil {
			return func(ctx context.Context) error { return s.deleteRecord(ctx, want.Name, want.Target) }, nil
		}
		if !errdefs.IsAlreadyExists(err) {
			return nil, err
		}
		var old images.Image
		if old, err = s.o.Images.Get(ctx, want.Name); errdefs.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, err
		}
		want.Labels = labelsFor(old, want.Target, chosen)
		if sameRecord(old, want) {
			return nil, nil
		}
		fields := []string{"target"}
		for l := range want.Labels {
			fields = append(fields, "labels."+l)
		}
		if _, err = s.o.Images.Update(ctx, want, fields...); errdefs.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, err
		}
		return func(ctx context.Context) error {
			_, err := s.o.Images.Update(ctx, old)
			return err
		}, nil
	}
	return nil, err
}

// labelsFor are the labels of a record with the target, where old was before.
// Nothing in them comes out of the image: an image's own never become
// containerd's. And nothing comes out of the configuration, which changes.
func labelsFor(old images.Image, target imagespec.Descriptor, chosen string) map[string]string {
	labels := map[string]string{labelManaged: managed}
	before := old.Labels[labelPlatforms]
	if old.Target.Digest != target.Digest && before != "" {
		before, labels[labelPlatforms] = "", "" // of another image
	}
	if chosen != "" {
		labels[labelPlatforms] = withChoice(before, chosen)
	}
	return labels
}

// sameRecord reports whether old says all that want does. Labels of others
// stay as they are.
func sameRecord(old, want images.Image) bool {
	merged := maps.Clone(old.Labels)
	for k, v := range want.Labels {
		if merged[k] != v {
			return false
		}
	}
	return old.Target.Digest == want.Target.Digest
}

func (s *Service) deleteRecord(ctx context.Context, name string, target imagespec.Descriptor) error {
	err := s.o.Images.Delete(ctx, name, images.DeleteTarget(&target))
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// sweepLeases deletes the leases of pulls that ended with their process.
func (s *Service) sweepLeases(ctx context.Context) error {
	old, err := s.o.Leases.List(ctx, fmt.Sprintf("labels.%q==true", labelLease))
	if err != nil {
		return fmt.Errorf("list leases of earlier pulls: %w", err)
	}
	for _, l := range old {
		if err := s.o.Leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("delete lease of an earlier pull: %w", err)
		}
	}
	return nil
}
