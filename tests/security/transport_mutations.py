"""`python -m tests.security.transport_mutations`: lets strangers in over the network.

In a copy of the sources, where a test has to fail. `-O` does so without asserts.
"""

import sys

from tests.support.mutations import Mutation, run_mutations

ROLES = "kvrelay/security/role_names.py"
CREDENTIALS = "kvrelay/security/credentials.py"
FILES = "kvrelay/security/certificate_files.py"
CERTIFICATES = "kvrelay/security/certificates.py"
PROCESS = "kvrelay/security/process_security.py"
RULES = "kvrelay/security/method_rules.py"
CLUSTER_KEY = "kvrelay/security/cluster_key.py"
TOKENS = "kvrelay/security/json_web_tokens.py"
GUARD = "kvrelay/security/guard.py"
VALKEY = "kvrelay/state/embedded_valkey.py"
SESSION = "gateway/workers/session.py"
ROGUE_TESTS = "tests/security/test_rogue_registered_workers.py"
TLS_TESTS = "tests/security/test_tls.py"
CERTIFICATE_TESTS = "tests/security/test_certificates.py"
RULE_TESTS = "tests/security/test_method_rules.py"
KEY_TESTS = "tests/security/test_cluster_key.py"
TOKEN_TESTS = "tests/security/test_json_web_tokens.py"
GUARD_TESTS = "tests/security/test_guard.py"
BIND_TESTS = "tests/security/test_bind.py"
DEPLOY_TESTS = "tests/project/test_deploy.py"
USERS = "deploy/compose/make_credentials.py"
VALKEY_TESTS = "tests/state/test_embedded_valkey.py"

TLS = (
    Mutation(
        "a name in plain text counts",
        ROLES,
        '    if list(auth_context.get(_TRANSPORT, ())) != [b"ssl"]:',
        "    if False:",
        f"{CERTIFICATE_TESTS}::test_any_other_caller_has_no_role",
    ),
    Mutation(
        "the first of several names counts",
        ROLES,
        "    if len(names) != 1:",
        "    if not names:",
        f"{CERTIFICATE_TESTS}::test_any_other_caller_has_no_role",
    ),
    Mutation(
        "names of another trust domain count",
        ROLES,
        'names[0].removeprefix(prefix) if names[0].startswith(prefix) else b""',
        'names[0].rpartition(b"/role/")[2]',
        f"{CERTIFICATE_TESTS}::test_any_other_caller_has_no_role",
    ),
    Mutation(
        "a worker wants no certificate",
        CREDENTIALS,
        "            require_client_authentication=asks_for_certificate,",
        "            require_client_authentication=False,",
        f"{TLS_TESTS}::test_a_stranger_is_refused_in_the_handshake",
    ),
    Mutation(
        "who dials takes any role",
        CREDENTIALS,
        "        return ChannelCredentials(self._made.tls, server_name(role, self._trust_domain), current.digest)",
        "        return ChannelCredentials(self._made.tls, None, current.digest)",
        f"{TLS_TESTS}::test_a_dialler_refuses_a_process_of_another_role",
    ),
    Mutation(
        "new certificates are not shown",
        CREDENTIALS,
        "            if current.digest == used.digest:",
        "            if True:",
        f"{TLS_TESTS}::test_a_server_shows_its_new_certificate_without_a_restart",
    ),
    Mutation(
        "a forgotten CA is trusted on",
        CREDENTIALS,
        "            used = current\n            return _configuration(current, asks_for_certificate)",
        "            before, used = used, current\n"
        "            mixed = type(current)(\n"
        "                current.certificate, current.key, (before.authorities or b'') + (current.authorities or b''),\n"
        "                current.digest)\n"
        "            return _configuration(mixed, asks_for_certificate)",
        f"{TLS_TESTS}::test_a_forgotten_ca_opens_no_new_connection",
    ),
    Mutation(
        "a channel keeps old certificates",
        CREDENTIALS,
        "        if self._made is None or self._made.digest != current.digest:",
        "        if self._made is None:",
        "tests/security/test_rotation.py::test_everything_is_swapped_under_200_streams",
    ),
    Mutation(
        "a process starts with another role's certificate",
        FILES,
        "        if missing := self._needed_names - _names_of(leaf):",
        "        if missing := frozenset[str]():",
        f"{TLS_TESTS}::test_a_certificate_of_another_role_is_refused_at_the_start",
    ),
    Mutation(
        "an expired certificate is used",
        FILES,
        "        if leaf.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):",
        "        if False:",
        f"{TLS_TESTS}::test_an_expired_certificate_does_not_replace_a_valid_one",
    ),
    Mutation(
        "a key of another certificate is used",
        FILES,
        "        if leaf.public_key() != private_key.public_key():",
        "        if False:",
        f"{TLS_TESTS}::test_a_key_of_another_certificate_is_refused",
    ),
    Mutation(
        "broken files replace good ones",
        FILES,
        "            except (OSError, ConfigError) as problem:",
        "            except ZeroDivisionError as problem:",
        f"{TLS_TESTS}::test_half_swapped_files_leave_the_old_pair_in_use",
    ),
    Mutation(
        "a part of the files is enough",
        PROCESS,
        "    if certificate is None or key is None or authorities is None:",
        "    if False:",
        f"{TLS_TESTS}::test_files_that_cannot_be_used_are_named",
    ),
    Mutation(
        "a worker with keys wants no certificate",
        PROCESS,
        "        takes_keys = role is Role.GATEWAY and bool(verifiers)",
        "        takes_keys = bool(verifiers)",
        f"{TLS_TESTS}::test_a_worker_with_keys_for_its_http_port_asks_for_certificates_all_the_same",
    ),
    Mutation(
        "the port of peers is everybody's",
        PROCESS,
        "self._certificates.server(asks_for_certificate=True)",
        "self._certificates.server(asks_for_certificate=False)",
        f"{TLS_TESTS}::test_a_gateway_with_keys_lets_clients_without_certificate_in_at_one_port_only",
    ),
    Mutation(
        "certificates bring no guard",
        PROCESS,
        "takes_keys or certificates is not None or (cluster_key",
        "takes_keys or (cluster_key",
        "tests/security/test_process_security.py::test_workers_are_guarded_by_certificates_only",
    ),
    Mutation(
        "any worker poses as a host",
        CERTIFICATES,
        "    hosts = (*LOCAL_HOSTS, *plan.hosts) if role in HOST_ROLES else ()",
        "    hosts = (*LOCAL_HOSTS, *plan.hosts)",
        f"{CERTIFICATE_TESTS}::test_only_processes_that_are_dialled_by_host_have_host_names",
    ),
    Mutation(
        "a client poses as a server",
        CERTIFICATES,
        "    if role in SERVER_ROLES:",
        "    if True:",
        f"{CERTIFICATE_TESTS}::test_a_client_cannot_pose_as_a_server",
    ),
    Mutation(
        "everybody reads a role's key",
        CERTIFICATES,
        '        _write(folder / f"{role}.key", key_pem, 0o600)',
        '        _write(folder / f"{role}.key", key_pem, 0o644)',
        f"{CERTIFICATE_TESTS}::test_only_the_owner_reads_the_folder_and_its_keys",
    ),
    Mutation(
        "everybody enters the folder of keys",
        CERTIFICATES,
        "    folder.mkdir(mode=0o700, parents=True, exist_ok=True)\n    folder.chmod(0o700)\n",
        "    folder.mkdir(parents=True, exist_ok=True)\n",
        f"{CERTIFICATE_TESTS}::test_only_the_owner_reads_the_folder_and_its_keys",
    ),
    Mutation(
        "a CA is overwritten",
        CERTIFICATES,
        "    if (folder / CA_KEY_FILE).exists():",
        "    if False:",
        f"{CERTIFICATE_TESTS}::test_a_folder_with_a_ca_is_not_overwritten",
    ),
)

PROOFS = (
    Mutation(
        "anybody opens a session with a decode worker",
        RULES,
        '_service("kvrelay.v1.DecodeService", _GATEWAYS, "Session")',
        '_service("kvrelay.v1.DecodeService", _ANY_ROLE, "Session")',
        f"{RULE_TESTS}::test_a_method_within_the_cluster_is_for_its_processes_only",
    ),
    Mutation(
        "anybody pushes KV",
        RULES,
        '_service("kvrelay.v1.KVTransferService", Rule(frozenset({Role.PREFILL})),',
        '_service("kvrelay.v1.KVTransferService", _ANY_ROLE,',
        f"{RULE_TESTS}::test_a_method_within_the_cluster_is_for_its_processes_only",
    ),
    Mutation(
        "clients read the whole cluster",
        RULES,
        'Rule(frozenset({Role.OPERATOR, Role.GATEWAY})), "GetCluster")',
        '_CLIENTS_AND_GATEWAYS, "GetCluster")',
        f"{RULE_TESTS}::test_a_method_within_the_cluster_is_for_its_processes_only",
    ),
    Mutation(
        "clients see the page of all tenants",
        RULES,
        '        "GET /api/overview": _OPERATORS,',
        '        "GET /api/overview": _CLIENTS,',
        f"{RULE_TESTS}::test_what_a_client_may_do_over_http_is_the_api_of_a_front",
    ),
    Mutation(
        "metrics are open",
        RULES,
        '"GET /metrics": _METRICS}',
        '"GET /metrics": OPEN}',
        f"{RULE_TESTS}::test_nothing_but_health_is_open",
    ),
    Mutation(
        "a file of keys has any size",
        "kvrelay/security/reloaded_file.py",
        "        if data is None or len(data) > MAX_FILE_BYTES:",
        "        if data is None:",
        "tests/security/test_reloaded_file.py::test_a_broken_file_keeps_the_value_until_it_is_mended",
    ),
    Mutation(
        "a file of keys may be a pipe",
        "kvrelay/security/reloaded_file.py",
        " | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer",
        " | os.O_CLOEXEC)",
        "tests/security/test_reloaded_file.py::test_a_start_with_a_file_that_cannot_be_used_is_refused",
        60,
    ),
    Mutation(
        "a bearer has any length",
        GUARD,
        " or len(token) > MAX_BEARER_CHARACTERS:",
        ":",
        f"{GUARD_TESTS}::test_no_verifier_gets_a_text_beyond_the_bound",
    ),
    Mutation(
        "the first of several keys counts",
        GUARD,
        "values[0] if len(values) == 1 and isinstance(values[0], str)",
        "values[0] if isinstance(values[0], str)",
        f"{GUARD_TESTS}::test_a_caller_without_a_valid_key_is_refused",
    ),
    Mutation(
        "the cluster's key proves every role",
        CLUSTER_KEY,
        "hmac.digest(self._key, said.encode(), hashlib.sha256).hex()",
        'hmac.digest(self._key, said.split(".", 2)[-1].encode(), hashlib.sha256).hex()',
        f"{KEY_TESTS}::test_a_proof_of_another_key_or_for_another_role_proves_nothing",
    ),
    Mutation(
        "a proof of the cluster's key counts at every address",
        CLUSTER_KEY,
        "        if not self._is_own(address) or int(time_ns) < self._since_ns:",
        "        if int(time_ns) < self._since_ns:",
        "tests/security/test_rogue_registered_workers.py::test_what_a_gateway_tells_a_rogue_opens_no_worker",
    ),
    Mutation(
        "a proof of the cluster's key counts for whoever listens later",
        CLUSTER_KEY,
        "        if not self._is_own(address) or int(time_ns) < self._since_ns:",
        "        if not self._is_own(address):",
        "tests/security/test_rogue_registered_workers.py::test_what_a_rogue_was_told_opens_no_later_worker_at_its_address",
    ),
    Mutation(
        "a gateway gives prompts to workers without the cluster's key",
        SESSION,
        "        if self._challenge is not None and not self._challenge.is_met_by(proof):",
        "        if False:",
        f"{ROGUE_TESTS}::test_who_has_not_the_clusters_key_gets_no_prompt_even_if_the_registry_names_it",
    ),
    Mutation(
        "a gateway asks no worker for the cluster's key",
        SESSION,
        "        if credentials is not None and not settings.takes_unproven:",
        "        if False:",
        f"{ROGUE_TESTS}::test_who_has_not_the_clusters_key_gets_no_prompt_even_if_the_registry_names_it",
    ),
    Mutation(
        "workers without the cluster's key are taken by default",
        "kvrelay/config/security_settings.py",
        "    any_workers: bool = Field(\n        default=False,",
        "    any_workers: bool = Field(\n        default=True,",
        f"{ROGUE_TESTS}::test_who_has_not_the_clusters_key_gets_no_prompt_even_if_the_registry_names_it",
    ),
    Mutation(
        "a worker's proof counts again",
        CLUSTER_KEY,
        "        self.nonce = secrets.token_bytes(NONCE_BYTES)",
        "        self.nonce = bytes(NONCE_BYTES)",
        f"{ROGUE_TESTS}::test_a_proof_of_the_same_address_is_of_one_session",
    ),
    Mutation(
        "a worker's proof counts for every role",
        CLUSTER_KEY,
        'f"{_WORKER_PREFIX}.{role}.{address',
        'f"{_WORKER_PREFIX}.{address',
        f"{KEY_TESTS}::test_a_workers_proof_is_of_its_role_address_key_and_session",
    ),
    Mutation(
        "a worker's proof counts at every address",
        CLUSTER_KEY,
        "{address.encode().hex()}.{gateway_nonce",
        "{gateway_nonce",
        f"{KEY_TESTS}::test_a_workers_proof_is_of_its_role_address_key_and_session",
    ),
    Mutation(
        "a worker's own number is not in its proof",
        CLUSTER_KEY,
        ".{worker_nonce.hex()}",
        "",
        f"{KEY_TESTS}::test_a_workers_proof_is_of_its_role_address_key_and_session",
    ),
    Mutation(
        "a worker proves itself for an address of others",
        CLUSTER_KEY,
        "        if len(nonce) != NONCE_BYTES or not self._is_own(address):",
        "        if len(nonce) != NONCE_BYTES:",
        f"{KEY_TESTS}::test_a_worker_proves_nothing_for_another_address_or_a_nonce_of_another_length",
    ),
    Mutation(
        "a worker proves itself for a number of any length",
        CLUSTER_KEY,
        "        if len(nonce) != NONCE_BYTES or not self._is_own(address):",
        "        if not self._is_own(address):",
        f"{KEY_TESTS}::test_a_worker_proves_nothing_for_another_address_or_a_nonce_of_another_length",
    ),
    Mutation(
        "a gateway whose workers have its key takes others",
        "kvrelay/cluster/local_cluster.py",
        "        if self.valkey is None and settings.security.cluster_key_file is None:",
        "        if True:",
        "tests/cluster/test_local_cluster.py::test_a_gateway_takes_any_workers_only_at_a_redis_of_others",
    ),
    Mutation(
        "a name is an address of the process",
        "kvrelay/network/own_places.py",
        "        if place == self._advertised:",
        '        if place == self._advertised or place.startswith("localhost:"):',
        "tests/network/test_own_places.py::test_an_address_that_another_process_may_have_is_not_own",
    ),
    Mutation(
        "the cluster's key is readable",
        CLUSTER_KEY,
        "    if mode & 0o077:",
        "    if False:",
        f"{KEY_TESTS}::test_a_key_that_others_can_read_is_refused",
    ),
    Mutation(
        "the cluster's key is short",
        CLUSTER_KEY,
        "    if len(key) < MIN_KEY_BYTES:",
        "    if False:",
        f"{KEY_TESTS}::test_a_short_key_is_refused",
    ),
    Mutation(
        "the cluster's key is written for everybody",
        CLUSTER_KEY,
        "            path.touch(0o600)\n",
        "",
        f"{KEY_TESTS}::test_a_written_key_is_for_its_user_alone_and_is_read_again",
    ),
    Mutation(
        "workers of one machine answer everybody there",
        PROCESS,
        "(cluster_key is not None and role is not Role.GATEWAY)",
        "False",
        f"{KEY_TESTS}::test_workers_of_serve_all_answer_only_their_own_processes",
    ),
    Mutation(
        "an expired token counts",
        TOKENS,
        "        if now >= expires + CLOCK_DIFFERENCE_S:",
        "        if False:",
        f"{TOKEN_TESTS}::test_a_token_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "a token counts before its time",
        TOKENS,
        "        if now < begins - CLOCK_DIFFERENCE_S:",
        "        if False:",
        f"{TOKEN_TESTS}::test_a_token_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "a token for others counts",
        TOKENS,
        '                    "verify_exp": False,\n',
        '                    "verify_exp": False,\n                    "verify_aud": False,\n',
        f"{TOKEN_TESTS}::test_a_token_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "a token of another issuer counts",
        TOKENS,
        '                    "verify_exp": False,\n',
        '                    "verify_exp": False,\n                    "verify_iss": False,\n',
        f"{TOKEN_TESTS}::test_a_token_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "a token gives any role",
        TOKENS,
        "    return frozenset(role for role in ROLES if role.value in names)",
        "    return frozenset(role for role in Role if role.value in names)",
        f"{TOKEN_TESTS}::test_a_token_of_each_algorithm_gives_tenant_and_roles",
    ),
    Mutation(
        "a short RSA key signs",
        TOKENS,
        '    if algorithm == "RS256" and key.key_size < MIN_RSA_BITS:',
        "    if False:",
        f"{TOKEN_TESTS}::test_a_key_set_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "private keys of an issuer are taken",
        TOKENS,
        "        if _PRIVATE_MEMBERS & entry.keys():",
        "        if False:",
        f"{TOKEN_TESTS}::test_a_key_set_that_is_not_as_it_must_be_is_refused",
    ),
    Mutation(
        "a client's key goes to a proxy in plain text",
        "kvrelay/client/api_keys.py",
        "    if uses_proxy and not is_encrypted:",
        "    if False:",
        "tests/client/test_api_keys.py::test_a_proxy_gets_no_key_in_plain_text",
    ),
    Mutation(
        "a name that begins as this machine's is its own",
        "kvrelay/client/api_keys.py",
        'host.lower() == "localhost" or',
        'host.lower().startswith("localhost") or',
        "tests/client/test_api_keys.py::test_a_key_goes_nowhere_else_in_plain_text",
    ),
)

HOSTS = (
    Mutation(
        "any host may be listened on",
        "kvrelay/network/exposure.py",
        "    if danger is None or is_loopback(host):",
        "    if True:",
        f"{BIND_TESTS}::test_a_process_refuses_hosts_where_strangers_would_be_a_danger",
    ),
    Mutation(
        "the word insecure is not needed",
        "kvrelay/network/exposure.py",
        "    if not insecure:",
        "    if False:",
        f"{BIND_TESTS}::test_a_process_refuses_hosts_where_strangers_would_be_a_danger",
    ),
    Mutation(
        "an unknown host is this machine",
        "kvrelay/network/listening.py",
        "        addresses = addresses_of(host)\n    except OSError:\n        return False",
        "        addresses = addresses_of(host)\n    except OSError:\n        return True",
        f"{BIND_TESTS}::test_a_process_refuses_hosts_where_strangers_would_be_a_danger",
    ),
    Mutation(
        "a name with one local address is local",
        "kvrelay/network/listening.py",
        "    return all(ipaddress.ip_address(address).is_loopback for _, address in addresses)",
        "    return any(ipaddress.ip_address(address).is_loopback for _, address in addresses)",
        f"{BIND_TESTS}::test_a_name_is_local_only_if_all_its_addresses_are",
    ),
    Mutation(
        "a gateway starts on any host",
        "gateway/main.py",
        "    exposure = exposure_of_gateway(security, settings)",
        "    exposure = None",
        f"{BIND_TESTS}::test_a_process_looks_at_its_host_before_anything_else_starts",
    ),
    Mutation(
        "a worker starts on any host",
        "kvrelay/worker/process.py",
        "    exposure = exposure_of_worker(security, settings)",
        "    exposure = None",
        f"{BIND_TESTS}::test_a_process_looks_at_its_host_before_anything_else_starts",
    ),
    Mutation(
        "a front starts on any host",
        "kvrelay/openai_frontend/main.py",
        "    check_host(settings, keys)\n    arguments",
        "    arguments",
        f"{BIND_TESTS}::test_a_process_looks_at_its_host_before_anything_else_starts",
    ),
    Mutation(
        "keys of a cluster protect from other machines",
        PROCESS,
        "        if self._certificates is not None:\n            return None\n        return PLAIN",
        "        if self._certificates is not None or self._bearer is not None:\n            return None\n        return PLAIN",
        f"{BIND_TESTS}::test_a_key_of_one_machine_protects_from_no_other",
    ),
    Mutation(
        "keys may come in plain text from other machines",
        PROCESS,
        "        return PLAIN_KEYS if self._takes_keys else ALL_RIGHTS",
        "        return None if self._takes_keys else ALL_RIGHTS",
        f"{BIND_TESTS}::test_a_process_refuses_hosts_where_strangers_would_be_a_danger",
    ),
    Mutation(
        "health does not tell that a gateway is exposed",
        "gateway/main.py",
        "showing_health(bound, exposure,",
        "showing_health(bound, None,",
        "tests/gateway/api/test_service.py::test_an_exposed_gateway_says_so_in_its_health",
    ),
    Mutation(
        "an exposed process says nothing",
        "kvrelay/network/exposure.py",
        " if exposure else None\n",
        " if not exposure else None\n",
        f"{BIND_TESTS}::test_an_exposed_process_says_so_again_and_again",
        60,
    ),
)

REDIS = (
    Mutation(
        "the Valkey has no password",
        VALKEY,
        'f"requirepass {self.password}\\n".encode()',
        'b"\\n"',
        f"{VALKEY_TESTS}::test_without_its_password_it_says_nothing_and_no_other_user_can_see_the_password",
    ),
    Mutation(
        "the Valkey's password is among its arguments",
        VALKEY,
        'command = (str(binary), *self._options(port), "-")',
        'command = (str(binary), *self._options(port), "--requirepass", self.password, "-")',
        f"{VALKEY_TESTS}::test_without_its_password_it_says_nothing_and_no_other_user_can_see_the_password",
    ),
    Mutation(
        "the Valkey listens for everybody",
        VALKEY,
        '"--unixsocketperm", "700")',
        '"--unixsocketperm", "777")',
        f"{VALKEY_TESTS}::test_it_answers_on_a_socket_of_this_user_alone_and_ends_when_stopped",
    ),
    Mutation(
        "the Valkey has a port as well",
        VALKEY,
        "port = (self._port or _free_port()) if self._on_tcp else 0",
        "port = self._port or _free_port()",
        f"{VALKEY_TESTS}::test_it_answers_on_a_socket_of_this_user_alone_and_ends_when_stopped",
    ),
    Mutation(
        "a url is shown with its password",
        "kvrelay/state/redis_url.py",
        '    hidden = "***@" if at else ""',
        "    hidden = secret + at",
        "tests/state/test_redis_url.py::test_any_password_that_is_not_encoded_is_used_or_refused_and_never_shown",
    ),
)

COMPOSE = (
    Mutation(
        "containers keep capabilities",
        "docker-compose.yml",
        "  cap_drop: [ALL]\n",
        "  cap_drop: []\n",
        f"{DEPLOY_TESTS}::test_containers_have_no_capabilities_no_writable_root_and_limits",
    ),
    Mutation(
        "containers gain privileges",
        "docker-compose.yml",
        '  security_opt: ["no-new-privileges:true"]\n',
        "  security_opt: []\n",
        f"{DEPLOY_TESTS}::test_containers_have_no_capabilities_no_writable_root_and_limits",
    ),
    Mutation(
        "containers write their root",
        "docker-compose.yml",
        "  read_only: true\n",
        "  read_only: false\n",
        f"{DEPLOY_TESTS}::test_containers_have_no_capabilities_no_writable_root_and_limits",
    ),
    Mutation(
        "containers start any number of processes",
        "docker-compose.yml",
        "  pids_limit: 512\n",
        "  pids_limit: 0\n",
        f"{DEPLOY_TESTS}::test_containers_have_no_capabilities_no_writable_root_and_limits",
    ),
    Mutation(
        "the front reaches Redis",
        "docker-compose.yml",
        "    networks: [clients]\n",
        "    networks: [clients, cluster]\n",
        f"{DEPLOY_TESTS}::test_only_gateways_and_workers_share_a_network_with_redis",
    ),
    Mutation(
        "the cluster's network leads out",
        "docker-compose.yml",
        "  cluster:\n    internal: true\n",
        "  cluster:\n    internal: false\n",
        f"{DEPLOY_TESTS}::test_only_gateways_and_workers_share_a_network_with_redis",
    ),
    Mutation(
        "a port is published to other hosts",
        "docker-compose.yml",
        '"127.0.0.1:${KVRELAY_HTTP_PORT:-50080}:50080"',
        '"${KVRELAY_HTTP_PORT:-50080}:50080"',
        f"{DEPLOY_TESTS}::test_ports_are_published_on_the_loopback_only",
    ),
    Mutation(
        "workers see a gateway's secrets",
        "docker-compose.yml",
        "      - prefill-secrets:/secrets/own:ro\n",
        "      - gateway-secrets:/secrets/own:ro\n",
        f"{DEPLOY_TESTS}::test_each_container_sees_the_secrets_of_its_own_role_only",
    ),
    Mutation(
        "Redis of compose has a plain port",
        "docker-compose.yml",
        '"--port", "0", "--tls-port", "6379"',
        '"--port", "6380", "--tls-port", "6379"',
        f"{DEPLOY_TESTS}::test_nothing_runs_insecure_and_redis_has_no_plain_port",
    ),
    Mutation(
        "Redis lets in who names no user",
        USERS,
        'lines = ["user default off"]',
        'lines = ["user default on nopass ~* +@all"]',
        f"{DEPLOY_TESTS}::test_passwords_keys_and_certificates_fit_together_and_stay",
    ),
    Mutation(
        "workers read requests",
        USERS,
        "~kvrelay:{registry}:* ~kvrelay:{probe*}:* %R~kvrelay:*:owner",
        "~kvrelay:*",
        f"{DEPLOY_TESTS}::test_a_worker_registers_with_its_user_and_reads_no_requests",
    ),
    Mutation(
        "workers write whose a request is",
        USERS,
        "%R~kvrelay:*:owner",
        "~kvrelay:*:owner",
        f"{DEPLOY_TESTS}::test_a_worker_registers_with_its_user_and_reads_no_requests",
    ),
    Mutation(
        "workers empty Redis",
        USERS,
        " -@dangerous +info",
        " +info",
        f"{DEPLOY_TESTS}::test_a_worker_registers_with_its_user_and_reads_no_requests",
    ),
)

MUTATIONS = (*TLS, *PROOFS, *HOSTS, *REDIS, *COMPOSE)

if __name__ == "__main__":
    sys.exit(run_mutations(MUTATIONS))
