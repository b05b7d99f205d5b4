package spec

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Hook is a program that a file of a hooks directory puts into containers, and
// into which ones.
type Hook struct {
	hook   specs.Hook
	stages []string
	when   condition
}

// condition is when a hook applies. In a file of version 1.0.0 everything that
// is set must hold, in one of version 0.1.0 anything.
type condition struct {
	any                bool
	always, bindMounts *bool
	// annotations are patterns of a key and its value.
	annotations [][2]*regexp.Regexp
	// commands are patterns of the executable's name.
	commands []*regexp.Regexp
}

// hookVersion is the schema of today; a file without a version has oldVersion.
const (
	hookVersion    = "1.0.0"
	oldHookVersion = "0.1.0"
)

// ParseHook reads a file of a hooks directory. That it cannot be read is not the
// fault of a request: FailedPrecondition.
func ParseHook(content []byte) (Hook, error) {
	var file struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal(content, &file); err != nil {
		return Hook{}, fmt.Errorf("parse hook: %w (%w)", err, errdefs.ErrFailedPrecondition)
	}
	read := map[string]func([]byte) (Hook, error){hookVersion: parseHook, oldHookVersion: parseOldHook, "": parseOldHook}[file.Version]
	if read == nil {
		return Hook{}, fmt.Errorf("parse hook: version %.32q is neither %q nor %q: %w", file.Version, hookVersion, oldHookVersion, errdefs.ErrFailedPrecondition)
	}
	h, err := read(content)
	if err == nil {
		err = h.check()
	}
	if err != nil {
		return Hook{}, fmt.Errorf("parse hook: %w (%w)", err, errdefs.ErrFailedPrecondition)
	}
	return h, nil
}

func parseHook(content []byte) (h Hook, err error) {
	var file struct {
		Hook specs.Hook `json:"hook"`
		When struct {
			Always        *bool             `json:"always"`
			Annotations   map[string]string `json:"annotations"`
			Commands      []string          `json:"commands"`
			HasBindMounts *bool             `json:"hasBindMounts"`
		} `json:"when"`
		Stages []string `json:"stages"`
	}
	if err := json.Unmarshal(content, &file); err != nil {
		return h, err
	}
	h = Hook{hook: file.Hook, stages: file.Stages, when: condition{always: file.When.Always, bindMounts: file.When.HasBindMounts}}
	for _, key := range slices.Sorted(maps.Keys(file.When.Annotations)) {
		if err := h.when.addAnnotation(key, file.When.Annotations[key]); err != nil {
			return h, err
		}
	}
	h.when.commands, err = patterns("when.commands", file.When.Commands)
	return h, err
}

// parseOldHook: most fields of version 0.1.0 have two names.
func parseOldHook(content []byte) (h Hook, err error) {
	var file struct {
		Hook          string   `json:"hook"`
		Arguments     []string `json:"arguments"`
		Stages        []string `json:"stages"`
		Stage         []string `json:"stage"`
		Cmds          []string `json:"cmds"`
		Cmd           []string `json:"cmd"`
		Annotations   []string `json:"annotations"`
		Annotation    []string `json:"annotation"`
		HasBindMounts *bool    `json:"hasbindmounts"`
	}
	if err := json.Unmarshal(content, &file); err != nil {
		return h, err
	}
	h = Hook{hook: specs.Hook{Path: file.Hook}, stages: append(file.Stages, file.Stage...), when: condition{any: true, bindMounts: file.HasBindMounts}}
	if len(file.Arguments) > 0 {
		h.hook.Args = append([]string{file.Hook}, file.Arguments...)
	}
	for _, value := range append(file.Annotations, file.Annotation...) {
		if err := h.when.addAnnotation("", value); err != nil {
			return h, err
		}
	}
	h.when.commands, err = patterns("cmds", append(file.Cmds, file.Cmd...))
	return h, err
}

func (c *condition) addAnnotation(key, value string) error {
	pair, err := patterns("annotations", []string{key, value})
	if err == nil {
		c.annotations = append(c.annotations, [2]*regexp.Regexp(pair))
	}
	return err
}

func patterns(field string, texts []string) (list []*regexp.Regexp, err error) {
	for _, text := range texts {
		p, err := regexp.Compile(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		list = append(list, p)
	}
	return list, nil
}

func (h *Hook) check() error {
	w := h.when
	switch {
	case !path.IsAbs(h.hook.Path):
		return fmt.Errorf("hook: %.256q is not an absolute path", h.hook.Path)
	case h.hook.Timeout != nil && *h.hook.Timeout <= 0:
		return fmt.Errorf("hook.timeout: %d is not a number of seconds", *h.hook.Timeout)
	case w.always == nil && w.bindMounts == nil && len(w.annotations) == 0 && len(w.commands) == 0:
		return fmt.Errorf("no condition says when it applies")
	case len(h.stages) == 0:
		return fmt.Errorf("stages: none")
	}
	for _, stage := range h.stages {
		if stageOf(&specs.Hooks{}, stage) == nil {
			return fmt.Errorf("stages: %.64q is unknown", stage)
		}
	}
	return nil
}

// stageOf is the list of hooks that a stage's name stands for, nil for none.
func stageOf(hooks *specs.Hooks, stage string) *[]specs.Hook {
	return map[string]*[]specs.Hook{
		"prestart": &hooks.Prestart, "createRuntime": &hooks.CreateRuntime, "createContainer": &hooks.CreateContainer,
		"startContainer": &hooks.StartContainer, "poststart": &hooks.Poststart, "poststop": &hooks.Poststop,
	}[stage]
}

// matches reports whether the hook applies to a container.
func (c condition) matches(command string, annotations map[string]string, bindMounts bool) bool {
	var held []bool
	if c.always != nil {
		held = append(held, *c.always)
	}
	if c.bindMounts != nil {
		held = append(held, *c.bindMounts && bindMounts)
	}
	for _, pair := range c.annotations {
		held = append(held, hasAnnotation(annotations, pair))
	}
	if len(c.commands) > 0 {
		held = append(held, slices.ContainsFunc(c.commands, func(p *regexp.Regexp) bool { return p.MatchString(command) }))
	}
	if c.any {
		return slices.Contains(held, true)
	}
	return len(held) > 0 && !slices.Contains(held, false)
}

func hasAnnotation(annotations map[string]string, pair [2]*regexp.Regexp) bool {
	for k, v := range annotations {
		if pair[0].MatchString(k) && pair[1].MatchString(v) {
			return true
		}
	}
	return false
}

// addHooks puts the hooks that apply behind those that are there. The
// annotations which count are those of the request.
func addHooks(in *ContainerInput, s *specs.Spec) {
	annotations := maps.Clone(s.Annotations)
	maps.Copy(annotations, in.Pod.GetAnnotations())
	maps.Copy(annotations, in.Config.GetAnnotations())
	for _, h := range in.Hooks {
		if !h.when.matches(s.Process.Args[0], annotations, len(in.Mounts) > 0) {
			continue
		}
		if s.Hooks == nil {
			s.Hooks = &specs.Hooks{}
		}
		for _, stage := range h.stages {
			list := stageOf(s.Hooks, stage)
			*list = append(*list, h.hook)
		}
	}
}

// CleanHooks gives every hook without an environment one of its own. A runtime
// would give it the container's, and hooks run on the host: a container with
// LD_PRELOAD in its environment had its library loaded there (CVE-2025-23266).
func CleanHooks(s *specs.Spec) {
	if s.Hooks == nil {
		return
	}
	for _, stage := range []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"} {
		list := *stageOf(s.Hooks, stage)
		for i := range list {
			if len(list[i].Env) == 0 {
				list[i].Env = []string{defaultPath}
			}
		}
	}
}
