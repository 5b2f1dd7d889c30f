#!/usr/bin/env bash
# Makes what a SuperLink and its SuperNodes need to trust each other: a private certificate authority, the
# server's certificate, a secret for the server's own processes, and a key for each device.
#
#   certificates.sh FOLDER SERVER[,SERVER…] [DEVICE…]
#
# SERVER: names or IP addresses by which devices and users reach the server; 127.0.0.1 and localhost are added.
# DEVICE: a name for each device's key. Call it again with other names to add their keys: what is there already is
# kept, and asking for a device's key twice is an error. DAYS (default 825) is how long certificates are valid.
set -euo pipefail
umask 077

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
fail() { echo "certificates.sh: $*" >&2; exit 1; }

[ $# -ge 2 ] || usage
folder=$1 servers=$2
shift 2
for tool in openssl ssh-keygen; do
  command -v "$tool" >/dev/null || fail "$tool is missing: install openssl and openssh-client"
done
for box in "$@"; do
  [[ $box =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "box name '$box': use letters, digits, '.', '_' and '-'"
  [ ! -e "$folder/boxes/$box" ] || fail "$folder/boxes/$box exists: nothing was changed; delete it to replace the key"
done

mkdir -p "$folder/boxes"
cd "$folder"

IFS=, read -ra names <<<"localhost,127.0.0.1,$servers"
alternatives=
for name in "${names[@]}"; do
  if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then kind=IP check=-checkip; else kind=DNS check=-checkhost; fi
  alternatives+=",$kind:$name"
  [ ! -e server.pem ] || openssl x509 -in server.pem -noout "$check" "$name" | grep -q "does match" ||
    fail "$folder/server.pem is not for $name: nothing was changed; delete it to make a new one"
done

ecdsa=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes)
if [ ! -e ca.crt ]; then
  openssl req -x509 "${ecdsa[@]}" -days "${DAYS:-825}" -keyout ca.key -out ca.crt -subj "/CN=fedfmd private CA" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
  chmod 644 ca.crt
fi
if [ ! -e server.pem ]; then
  extensions=$(mktemp)
  trap 'rm -f "$extensions" server.csr' EXIT
  printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n' "${alternatives#,}" >"$extensions"
  openssl req "${ecdsa[@]}" -keyout server.key -out server.csr -subj "/CN=fedfmd SuperLink" 2>/dev/null
  openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days "${DAYS:-825}" \
    -extfile "$extensions" -out server.pem 2>/dev/null
  chmod 644 server.pem
fi
[ -e superexec.secret ] || openssl rand 32 >superexec.secret
for box in "$@"; do
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "$box" -f "boxes/$box"
done
echo "$PWD: ca.crt for everybody; server.key, server.pem and superexec.secret for the server; boxes/NAME for its device" \
  "alone; boxes/NAME.pub to register it; ca.key for a safe place offline"
