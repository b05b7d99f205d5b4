package stream

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// TLS says how the server proves who it is. Without files it makes a
// certificate of its own, which lives as long as the server.
type TLS struct {
	// CertFile and KeyFile are read anew when they change.
	CertFile, KeyFile string
}

// selfSignedLife is longer than any daemon runs.
const selfSignedLife = 10 * 365 * 24 * time.Hour

func (t *TLS) config(host string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	switch {
	case t.CertFile == "" && t.KeyFile == "":
		cert, err := selfSigned(host)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{cert}
	case t.CertFile == "" || t.KeyFile == "":
		return nil, fmt.Errorf("certificate and key go together: %w", errdefs.ErrInvalidArgument)
	default:
		p := &keyPair{files: [2]string{t.CertFile, t.KeyFile}}
		if _, err := p.get(nil); err != nil {
			return nil, err
		}
		c.GetCertificate = p.get
	}
	return c, nil
}

func selfSigned(host string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: host},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(selfSignedLife),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if name, err := os.Hostname(); err == nil {
		tmpl.DNSNames = append(tmpl.DNSNames, name)
	}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// keyPair is a certificate in files.
type keyPair struct {
	files [2]string // certificate, key

	mu    sync.Mutex
	cert  *tls.Certificate
	times [2]time.Time
}

// get returns the certificate. While the files are being replaced, and do not
// fit each other, the one from before is used.
func (p *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var times [2]time.Time
	var errs [2]error
	for i, name := range p.files {
		st, err := os.Stat(name)
		if errs[i] = err; err == nil {
			times[i] = st.ModTime()
		}
	}
	err := errors.Join(errs[:]...)
	if err == nil && p.cert != nil && times == p.times {
		return p.cert, nil
	}
	if err == nil {
		var cert tls.Certificate
		if cert, err = tls.LoadX509KeyPair(p.files[0], p.files[1]); err == nil {
			p.cert, p.times = &cert, times
		}
	}
	if p.cert != nil {
		return p.cert, nil
	}
	return nil, fmt.Errorf("load key pair: %w", err)
}
