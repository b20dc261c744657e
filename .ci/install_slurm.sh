#!/usr/bin/env bash
# Install what tests/slurm needs to start a real Slurm cluster on this machine (Debian or Ubuntu, as root).
#
# Run again, it does nothing once all is there. The suite starts its own daemons with its own
# configuration, so any service that the packages start by themselves is kept from starting, or
# stopped. Fails loudly: a suite without Slurm must not look like one that passed.
set -euo pipefail

packages=(slurm-wlm slurmctld slurmd slurmdbd slurm-client munge mariadb-server mariadb-client faketime)
commands=(sbatch squeue sacct sacctmgr scontrol slurmctld slurmd slurmdbd munged mariadbd mariadb-install-db mariadb-admin setsid faketime)
services=(slurmctld slurmd slurmdbd munge mariadb)
export PATH="$PATH:/usr/sbin:/sbin"

missing() {
  local command
  for command in "${commands[@]}"; do
    command -v "$command" >/dev/null || printf '%s ' "$command"
  done
}

die() {
  printf 'install_slurm: %s\n' "$1" >&2
  exit 1
}

# The network of a build machine fails now and then; a missing package fails each time.
retry() {
  local attempt
  for attempt in 1 2 3; do
    "$@" && return 0
    printf 'install_slurm: attempt %s of 3 failed: %s\n' "$attempt" "$*" >&2
    sleep $((attempt * 5))
  done
  return 1
}

# invoke-rc.d asks this script whether a package may start its service; 101 means no.
forbid_services() {
  local policy=/usr/sbin/policy-rc.d
  [ -e "$policy" ] && return 0
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap "rm -f $policy" EXIT
}

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  forbid_services
  retry apt-get update -q || die "apt-get update failed"
  retry apt-get install -q -y --no-install-recommends "${packages[@]}" || die "apt-get install failed: ${packages[*]}"
}

# A machine with systemd may have started them all the same, or they were installed earlier.
stop_services() {
  [ -d /run/systemd/system ] || return 0
  local service
  for service in "${services[@]}"; do
    if systemctl is-active --quiet "$service"; then
      systemctl disable --now --quiet "$service" || die "cannot stop $service"
    fi
  done
}

if [ -n "$(missing)" ]; then
  [ "$(id -u)" = 0 ] || die "not installed: $(missing)- run as root to install it"
  command -v apt-get >/dev/null || die "not installed: $(missing)- and there is no apt-get here; install Slurm, munge and MariaDB by hand"
  install_packages
  [ -z "$(missing)" ] || die "still not installed: $(missing)"
  stop_services
fi
printf 'install_slurm: %s is ready\n' "$(slurmctld -V)"
