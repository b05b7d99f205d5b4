package spec

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestParseHook: what applies when, in both versions of the schema.
func TestParseHook(t *testing.T) {
	type container struct {
		command     string
		annotations map[string]string
		bind        bool
	}
	plain, marked := container{command: "/bin/sh"}, container{command: "/bin/sh", annotations: map[string]string{"a.b/c": "yes", "d": "no"}}
	bound := container{command: "/usr/bin/app", bind: true}
	file := func(when string) string {
		return `{"version": "1.0.0", "hook": {"path": "/h", "args": ["h", "x"], "timeout": 3}, "when": ` + when + `, "stages": ["prestart"]}`
	}
	old := func(conditions string) string {
		return `{"hook": "/h", "arguments": ["x"], "stages": ["prestart"], ` + conditions + `}`
	}
	for name, tc := range map[string]struct {
		text string
		yes  []container
		no   []container
	}{
		"always":           {file(`{"always": true}`), []container{plain, marked, bound}, nil},
		"never":            {file(`{"always": false}`), nil, []container{plain, marked, bound}},
		"annotation":       {file(`{"annotations": {"^a\\.b/c$": "yes|maybe"}}`), []container{marked}, []container{plain, bound}},
		"other value":      {file(`{"annotations": {"^a\\.b/c$": "no"}}`), nil, []container{marked}},
		"two annotations":  {file(`{"annotations": {"^a": "yes", "^d": "no"}}`), []container{marked}, []container{plain}},
		"one of them not":  {file(`{"annotations": {"^a": "yes", "^x": "no"}}`), nil, []container{marked}},
		"command":          {file(`{"commands": ["/app$", "^/sbin/"]}`), []container{bound}, []container{plain}},
		"bind mounts":      {file(`{"hasBindMounts": true}`), []container{bound}, []container{plain}},
		"no bind mounts":   {file(`{"hasBindMounts": false}`), nil, []container{plain, bound}},
		"all":              {file(`{"hasBindMounts": true, "commands": ["sh$"]}`), nil, []container{plain, bound}},
		"old annotation":   {old(`"annotation": ["^yes$"]`), []container{marked}, []container{plain}},
		"old any":          {old(`"cmds": ["app$"], "annotations": ["^yes$", "^never$"]`), []container{bound, marked}, []container{plain}},
		"old bind":         {old(`"hasbindmounts": true, "cmd": ["nothing"]`), []container{bound}, []container{plain}},
		"old with version": {old(`"version": "0.1.0", "cmd": ["sh"]`), []container{plain}, []container{bound}},
	} {
		h, err := ParseHook([]byte(tc.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if h.hook.Path != "/h" || len(h.hook.Args) != 2 || h.hook.Args[1] != "x" {
			t.Errorf("%s: the hook is %+v", name, h.hook)
		}
		for want, list := range map[bool][]container{true: tc.yes, false: tc.no} {
			for _, c := range list {
				if h.when.matches(c.command, c.annotations, c.bind) != want {
					t.Errorf("%s: %+v must give %t", name, c, want)
				}
			}
		}
	}
}

func TestParseHookRefuses(t *testing.T) {
	for word, text := range map[string]string{
		"parse hook":           `{`,
		"version":              `{"version": "2.0.0"}`,
		"not an absolute path": `{"version": "1.0.0", "hook": {"path": "h"}, "when": {"always": true}, "stages": ["prestart"]}`,
		"timeout":              `{"version": "1.0.0", "hook": {"path": "/h", "timeout": 0}, "when": {"always": true}, "stages": ["prestart"]}`,
		"no condition":         `{"version": "1.0.0", "hook": {"path": "/h"}, "when": {}, "stages": ["prestart"]}`,
		"stages: none":         `{"version": "1.0.0", "hook": {"path": "/h"}, "when": {"always": true}}`,
		`"precreate"`:          `{"version": "1.0.0", "hook": {"path": "/h"}, "when": {"always": true}, "stages": ["precreate"]}`,
		"when.commands":        `{"version": "1.0.0", "hook": {"path": "/h"}, "when": {"commands": ["("]}, "stages": ["prestart"]}`,
		"annotations":          `{"hook": "/h", "annotations": ["["], "stages": ["prestart"]}`,
		"cannot unmarshal":     `{"version": "1.0.0", "hook": "/h", "when": {"always": true}, "stages": ["prestart"]}`,
	} {
		if _, err := ParseHook([]byte(text)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

// TestHooks: a hook is in every stage it names, behind those of the base, and
// none of them inherits the container's environment.
func TestHooks(t *testing.T) {
	h, err := ParseHook([]byte(`{"version": "1.0.0", "hook": {"path": "/h", "env": ["A=b"]}, "when": {"annotations": {"^mark$": "^yes$"}},
		"stages": ["createContainer", "poststop"]}`))
	if err != nil {
		t.Fatal(err)
	}
	s := mustContainer(t, func(in *ContainerInput) {
		in.Hooks = []Hook{h}
		in.Config.Annotations = map[string]string{"mark": "yes"}
		in.Config.Envs = []*cri.KeyValue{{Key: "LD_PRELOAD", Value: []byte("/evil.so")}}
		in.Handler.BaseSpec = &specs.Spec{Hooks: &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/base"}}}}
	})
	CleanHooks(s)
	created := s.Hooks.CreateContainer
	if len(created) != 2 || created[0].Path != "/base" || created[1].Path != "/h" || len(s.Hooks.Poststop) != 1 {
		t.Fatalf("hooks are %+v", s.Hooks)
	}
	if len(created[0].Env) != 1 || !strings.HasPrefix(created[0].Env[0], "PATH=") || len(created[1].Env) != 1 || created[1].Env[0] != "A=b" {
		t.Errorf("environments are %q, %q", created[0].Env, created[1].Env)
	}
	if s := mustContainer(t, func(in *ContainerInput) { in.Hooks = []Hook{h} }); s.Hooks != nil {
		t.Errorf("without the annotation: %+v", s.Hooks)
	}
}

// FuzzParseHook: a file is refused, or makes a hook that can be asked about any
// container and that names a program by its absolute path.
func FuzzParseHook(f *testing.F) {
	f.Add([]byte(`{"version": "1.0.0", "hook": {"path": "/h"}, "when": {"annotations": {"a": "b"}, "commands": ["c"], "hasBindMounts": true}, "stages": ["prestart"]}`), "c", "a", "b")
	f.Add([]byte(`{"hook": "/h", "cmd": ["x"], "annotation": ["y"], "stage": ["poststop"], "arguments": ["z"]}`), "c", "a", "b")
	f.Fuzz(func(t *testing.T, text []byte, command, key, value string) {
		h, err := ParseHook(text)
		if err != nil {
			return
		}
		h.when.matches(command, map[string]string{key: value}, true)
		s := &specs.Spec{Hooks: &specs.Hooks{}}
		for _, stage := range h.stages {
			list := stageOf(s.Hooks, stage)
			*list = append(*list, h.hook)
		}
		CleanHooks(s)
		b, err := json.Marshal(s)
		if err != nil || !strings.Contains(string(b), `"env":`) {
			t.Errorf("%s, %v", fmt.Sprintf("%.200s", b), err)
		}
	})
}
