#!/usr/bin/env bash
# Boots an x86_64 emulator without a window, runs a command against it, and shuts it down.
#
#   ./emulator.sh mobileqat bench qat.tflite --target android
#
# Needs ANDROID_HOME with cmdline-tools, and /dev/kvm. API=34, IMAGE=google_apis and BOOT_SECONDS=300 can be set.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: $0 COMMAND [ARGUMENT...]" >&2
  exit 2
fi

sdk=${ANDROID_HOME:-${ANDROID_SDK_ROOT:-}}
if [[ ! -d $sdk ]]; then
  echo "ANDROID_HOME is not the folder of an Android SDK. Get the command line tools from" >&2
  echo "https://developer.android.com/studio#command-line-tools-only" >&2
  exit 2
fi
export PATH=$sdk/cmdline-tools/latest/bin:$sdk/platform-tools:$sdk/emulator:$PATH
if [[ ! -w /dev/kvm ]]; then
  echo "/dev/kvm cannot be used, and without it an emulator takes hours. Run: sudo usermod -aG kvm \$USER" >&2
  exit 2
fi

image="system-images;android-${API:-34};${IMAGE:-google_apis};x86_64"
port=5580
export ANDROID_SERIAL=emulator-$port
folder=$(mktemp -d)
export ANDROID_AVD_HOME=$folder
emulator_pid=""

is_running() {
  [[ -n $emulator_pid ]] && kill -0 "$emulator_pid" 2>/dev/null
}

clean_up() {
  if is_running; then
    timeout 20 adb -s "$ANDROID_SERIAL" emu kill >/dev/null 2>&1 || true
    for _ in $(seq 30); do
      is_running || break
      sleep 1
    done
    kill -9 "$emulator_pid" 2>/dev/null || true
  fi
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# sdkmanager asks for licences; `yes` ends with SIGPIPE, which is no failure here.
{ yes || true; } | sdkmanager --install platform-tools emulator "$image" >"$folder/sdkmanager.log" || {
  cat "$folder/sdkmanager.log" >&2
  exit 1
}
echo no | avdmanager --silent create avd --force --name mobileqat --package "$image" --path "$folder/mobileqat.avd"

if timeout 20 adb devices | grep -q "^$ANDROID_SERIAL"; then
  echo "$ANDROID_SERIAL runs already, and is not ours: end it with: adb -s $ANDROID_SERIAL emu kill" >&2
  exit 1
fi
emulator -avd mobileqat -port $port -no-window -no-audio -no-boot-anim -no-snapshot -gpu swiftshader_indirect \
  >"$folder/emulator.log" 2>&1 &
emulator_pid=$!

has_booted() {
  [[ $(timeout 10 adb -s "$ANDROID_SERIAL" shell getprop sys.boot_completed 2>/dev/null | tr -d '\r') == 1 ]]
}

# `adb wait-for-device` has no time limit, so the property is polled.
end=$((SECONDS + ${BOOT_SECONDS:-300}))
until is_running && has_booted; do
  if ! is_running || ((SECONDS > end)); then
    echo "The emulator did not boot:" >&2
    tail -n 20 "$folder/emulator.log" >&2
    exit 1
  fi
  sleep 2
done

"$@"
