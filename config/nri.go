package config

import (
	"cmp"
	"time"
)

// NRI is the configuration of the Node Resource Interface.
type NRI struct {
	Disable bool
	// SocketPath is where plugins connect, unless DisableConnections.
	SocketPath         string
	DisableConnections bool
	// PluginPath has the plugins to start, PluginConfigPath their settings.
	PluginPath, PluginConfigPath string
	// RegistrationTimeout is for a plugin to introduce itself, RequestTimeout
	// for its answer to one event.
	RegistrationTimeout, RequestTimeout time.Duration
	Validator                           NRIValidator
}

// NRIValidator is what the built-in validator refuses. Without Enable it
// refuses nothing.
type NRIValidator struct {
	Enable         bool
	RejectOCIHooks bool
	RejectRuntimeDefaultSeccomp, RejectUnconfinedSeccomp,
	RejectCustomSeccomp bool
	RejectNamespaces, RejectSysctls bool
	// RequiredPlugins must have had their say about every container, except in
	// pods with the annotation TolerateMissingAnnotation.
	RequiredPlugins           []string
	TolerateMissingAnnotation string
}

// The adaptation's own defaults, which an empty value stands for too.
const (
	defaultNRISocket    = "/var/run/nri/nri.sock"
	defaultNRIPlugins   = "/opt/nri/plugins"
	defaultNRIConfigs   = "/etc/nri/conf.d"
	defaultRegistration = 5 * time.Second
	defaultRequest      = 2 * time.Second
)

// ParseNRI checks the NRI table and returns its meaning. The error joins a
// KeyError for everything that is wrong.
func ParseNRI(raw Raw) (NRI, []Warning, error) {
	w, v := load(NRIPlugin, raw)
	out := NRI{
		Disable: v.bool("disable"), DisableConnections: v.bool("disable_connections"),
		SocketPath:          cmp.Or(v.str("socket_path"), defaultNRISocket),
		PluginPath:          cmp.Or(v.str("plugin_path"), defaultNRIPlugins),
		PluginConfigPath:    cmp.Or(v.str("plugin_config_path"), defaultNRIConfigs),
		RegistrationTimeout: cmp.Or(v.duration("plugin_registration_timeout", 0), defaultRegistration),
		RequestTimeout:      cmp.Or(v.duration("plugin_request_timeout", 0), defaultRequest),
		Validator: NRIValidator{
			Enable: v.bool("default_validator.enable"), RejectOCIHooks: v.bool("default_validator.reject_oci_hook_adjustment"),
			RejectRuntimeDefaultSeccomp: v.bool("default_validator.reject_runtime_default_seccomp_adjustment"),
			RejectUnconfinedSeccomp:     v.bool("default_validator.reject_unconfined_seccomp_adjustment"),
			RejectCustomSeccomp:         v.bool("default_validator.reject_custom_seccomp_adjustment"),
			RejectNamespaces:            v.bool("default_validator.reject_namespace_adjustment"),
			RejectSysctls:               v.bool("default_validator.reject_sysctl_adjustment"),
			RequiredPlugins:             v.list("default_validator.required_plugins"),
			TolerateMissingAnnotation:   v.str("default_validator.tolerate_missing_plugins_annotation"),
		},
	}
	w.absolute(out.SocketPath, "socket_path")
	w.absolute(out.PluginPath, "plugin_path")
	w.absolute(out.PluginConfigPath, "plugin_config_path")
	warnings, err := w.result()
	if err != nil {
		return NRI{}, warnings, err
	}
	return out, warnings, nil
}
