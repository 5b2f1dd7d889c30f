#!/usr/bin/env bash
# Makes and renews what a SuperLink and its SuperNodes need to trust each other. Every private key is made on the
# machine that uses it, and stays there.
#
#   certificates.sh ca FOLDER                             a certificate authority (CA): ca.key, ca.crt; not on the server
#   certificates.sh server FOLDER                         on the server: server.key, server.csr, superexec.secret
#   certificates.sh sign FOLDER REQUEST SERVER[,SERVER…]  where the CA is: server.pem, beside the server's REQUEST
#   certificates.sh device FOLDER NAME                    on a device: its key NAME, NAME.pub, NAME.secret
#   certificates.sh check FOLDER                          exit 1 if a certificate is no good, or soon to be renewed
#   certificates.sh FOLDER SERVER[,SERVER…] [DEVICE…]     all of it on one machine, for a trial
#
# SERVER: names or IP addresses by which devices reach the server; 127.0.0.1 and localhost are added.
# What is there is kept, never overwritten: call it again as often as you like. Only certificates that end within
# RENEW_DAYS (default 30) are replaced, by `ca` and `sign`, for the same keys; the last one is kept as NAME.old.
# DAYS (default 825) is how long the server's certificate is valid, CA_DAYS (default 3650) the CA's.
#
# Private keys are their owner's alone. Called by root, `server` and `device` let the services read theirs, by the
# groups fedfmd-link (SuperLink, SuperNode) and fedfmd (submitted code).
set -euo pipefail
umask 077

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
fail() { echo "certificates.sh: $*" >&2; exit 1; }
step() { # WHAT COMMAND…: run it, or say what failed and why
  local what=$1 said
  shift
  said=$("$@" 2>&1) || fail "$what failed: $(tail -n 3 <<<"${said:-"$1 doesn't say why"}")"
}
number() { # NAME DEFAULT: the whole number in the variable of that name
  [[ ${!1:-$2} =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1=${!1}: give a number of days"
  echo "${!1:-$2}"
}
within() { openssl x509 -in "$1" -noout -checkend $((86400 * $2)) >/dev/null; } # CERTIFICATE DAYS: it lasts so long
matches() { openssl x509 -in "$1" -noout "$2" "$3" | grep -q "does match"; }
open_folder() {
  step "making $1" mkdir -p -- "$1"
  folder=$(cd -- "$1" && pwd) || fail "$1 can't be entered"
  [ -w "$folder" ] || fail "$folder can't be written to by $(id -un)"
  new=$(mktemp -d "$folder/.new.XXXXXX") || fail "$folder has no room for new files"
  trap 'rm -rf "$new"' EXIT # what a failed step leaves behind
}
place() { # MODE NAME: put a finished file where it belongs, beside the one that it renews
  [ ! -e "$folder/$2" ] || step "keeping $folder/$2.old" mv -f "$folder/$2" "$folder/$2.old"
  step "setting the mode of $2" chmod "$1" "$new/$2"
  step "writing $folder/$2" mv "$new/$2" "$folder/$2"
  echo "$folder/$2: made"
}
lend() { # NAME GROUP: let a service read it, and nobody but root change it
  [ "$(id -u)" = 0 ] || return 0
  step "making $folder root's" chown root:root "$folder"
  step "letting services enter $folder" chmod 755 "$folder"
  if getent group "$2" >/dev/null; then
    step "giving $folder/$1 to the group $2" chown "root:$2" "$folder/$1"
    step "letting the group $2 read $folder/$1" chmod 640 "$folder/$1"
  else
    step "giving $folder/$1 to root" chown root:root "$folder/$1"
    echo "certificates.sh: there is no group $2, so that root alone reads $folder/$1: add the user, call this again" >&2
  fi
}
make_key() { # NAME
  step "making $1" openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$new/$1"
  place 600 "$1"
}
make_secret() { # NAME
  [ ! -e "$folder/$1" ] || { echo "$folder/$1: kept"; return; }
  step "making $1" openssl rand -out "$new/$1" 32
  place 600 "$1"
}

make_ca() {
  if [ -e "$folder/ca.crt" ] && [ ! -e "$folder/ca.key" ]; then
    fail "$folder has ca.crt but no ca.key: the CA is elsewhere; nothing was changed"
  fi
  [ -e "$folder/ca.key" ] || make_key ca.key
  if [ -e "$folder/ca.crt" ] && within "$folder/ca.crt" "$renew"; then
    echo "$folder/ca.crt: kept"
    return
  fi
  step "making ca.crt" openssl req -x509 -new -key "$folder/ca.key" -days "$ca_days" -out "$new/ca.crt" \
    -subj "/CN=fedfmd private CA" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign,cRLSign"
  place 644 ca.crt
}

make_server() {
  if [ -e "$folder/server.key" ]; then echo "$folder/server.key: kept"; else make_key server.key; fi
  if [ -e "$folder/server.csr" ]; then
    echo "$folder/server.csr: kept"
  else
    step "making server.csr" openssl req -new -key "$folder/server.key" -out "$new/server.csr" \
      -subj "/CN=fedfmd SuperLink"
    place 644 server.csr
  fi
  make_secret superexec.secret
  lend server.key fedfmd-link
  lend superexec.secret fedfmd
}

sign() { # CA REQUEST SERVERS, into $folder
  local ca=$1 request=$2 names name kind alternatives=
  [ -e "$ca/ca.key" ] || fail "$ca/ca.key is missing: sign where the CA is"
  [ -r "$request" ] || fail "$request can't be read: give the server's server.csr"
  step "checking $request" openssl req -in "$request" -noout -verify
  IFS=, read -ra names <<<"localhost,127.0.0.1,$3"
  for name in "${names[@]}"; do
    [[ $name =~ ^[A-Za-z0-9.:-]+$ ]] || fail "server '$name': give names or IP addresses, with commas between"
    if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then kind=IP; else kind=DNS; fi
    alternatives+=",$kind:$name"
  done
  if [ -e "$folder/server.pem" ] && within "$folder/server.pem" "$renew"; then
    for name in "${names[@]}"; do
      if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then kind=-checkip; else kind=-checkhost; fi
      matches "$folder/server.pem" "$kind" "$name" ||
        fail "$folder/server.pem is not for $name: nothing was changed; delete it to make a new one"
    done
    [ "$(openssl x509 -in "$folder/server.pem" -noout -pubkey)" = "$(openssl req -in "$request" -noout -pubkey)" ] ||
      fail "$folder/server.pem is for another key than $request: nothing was changed; delete it to make a new one"
    echo "$folder/server.pem: kept"
    return
  fi
  cat >"$new/extensions" <<END
subjectAltName=${alternatives#,}
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
END
  step "signing $request" openssl x509 -req -in "$request" -CA "$ca/ca.crt" -CAkey "$ca/ca.key" -days "$days" \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$new/extensions" -out "$new/server.pem"
  place 644 server.pem
}

make_device() { # NAME
  if [ -e "$folder/$1" ]; then
    echo "$folder/$1: kept"
  else
    step "making the key of $1" ssh-keygen -q -t ecdsa -b 384 -N "" -C "$1" -f "$new/$1"
    place 600 "$1"
    place 644 "$1.pub"
  fi
  make_secret "$1.secret"
  lend "$1" fedfmd-link
  lend "$1.secret" fedfmd
}

check() { # FOLDER
  local file end bad=0 found=0
  for file in "$1/ca.crt" "$1/server.pem"; do
    [ -e "$file" ] || continue
    found=1
    end=$(openssl x509 -in "$file" -noout -enddate) || fail "$file can't be read as a certificate"
    if within "$file" "$renew"; then
      echo "$file: valid until ${end#*=}"
    else
      bad=1
      echo "certificates.sh: $file ends on ${end#*=}: renew it, as the README tells" >&2
    fi
  done
  [ $found = 1 ] || fail "$1 has neither ca.crt nor server.pem"
  if [ -e "$1/ca.crt" ] && [ -e "$1/server.pem" ]; then
    step "checking that $1/server.pem is from $1/ca.crt" \
      openssl verify -no_check_time -CAfile "$1/ca.crt" "$1/server.pem"
  fi
  exit $bad
}

[ $# -ge 2 ] || usage
for tool in openssl ssh-keygen; do
  command -v "$tool" >/dev/null || fail "$tool is missing: install openssl and openssh-client"
done
days=$(number DAYS 825) ca_days=$(number CA_DAYS 3650) renew=$(number RENEW_DAYS 30)
[ "$days" -gt "$renew" ] && [ "$ca_days" -gt "$renew" ] ||
  fail "RENEW_DAYS=$renew: must be less than DAYS=$days and CA_DAYS=$ca_days"

check_name() {
  [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "device name '$1': use letters, digits, '.', '_' and '-'"
}

case $1 in
  ca | server | check) [ $# = 2 ] || usage ;;
  sign) [ $# = 4 ] || usage ;;
  device) [ $# = 3 ] || usage ;;
esac
case $1 in
  ca)
    open_folder "$2"
    make_ca
    echo "ca.crt is for everybody; ca.key stays here, on a machine that no device or submitter reaches"
    ;;
  server)
    open_folder "$2"
    make_server
    echo "next: take server.csr to the CA, and bring server.pem and ca.crt back: certificates.sh sign …"
    ;;
  sign)
    [ -e "$3" ] || fail "$3 can't be read: give the server's server.csr"
    open_folder "$(dirname -- "$3")"
    sign "$2" "$3" "$4"
    ;;
  device)
    check_name "$3"
    open_folder "$2"
    make_device "$3"
    echo "next: register $3.pub on the server, once; the key itself stays here"
    ;;
  check) check "$2" ;;
  *)
    for box in "${@:3}"; do check_name "$box"; done
    open_folder "$1"
    make_ca
    make_server
    sign "$folder" "$folder/server.csr" "$2"
    if [ $# -gt 2 ]; then
      rm -rf "$new"
      open_folder "$folder/boxes"
      for box in "${@:3}"; do make_device "$box"; done
    fi
    echo "for a trial: outside of one, ca.key belongs on another machine, and each device makes its own key"
    ;;
esac
