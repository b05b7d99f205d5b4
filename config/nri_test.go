package config

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestParseNRI(t *testing.T) {
	def, warnings, err := ParseNRI(*DefaultNRI())
	if err != nil || len(warnings) > 0 {
		t.Fatal(warnings, err)
	}
	empty, _, err := ParseNRI(Raw{"socket_path": "", "plugin_path": "", "plugin_config_path": "", "plugin_request_timeout": "0s", "plugin_registration_timeout": "0s"})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, empty, def)
	if def.Disable || def.RequestTimeout != 2*time.Second || def.SocketPath == "" || def.Validator.Enable {
		t.Errorf("the default is %+v", def)
	}
	got, _, err := ParseNRI(Raw{"plugin_request_timeout": "7s", "default_validator": map[string]any{"enable": true, "required_plugins": []any{"a"}}})
	if err != nil || got.RequestTimeout != 7*time.Second || !got.Validator.Enable || len(got.Validator.RequiredPlugins) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	for key, value := range map[string]any{"socket_path": "nri.sock", "plugin_request_timeout": "soon", "disable": "no", "socket": "/x"} {
		if _, _, err := ParseNRI(Raw{key: value}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), key) {
			t.Errorf("%s = %v: %v", key, value, err)
		}
	}
}
