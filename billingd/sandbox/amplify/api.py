"""The API Server over HTTP: paths, verbs and answers (amplify.md 2.1, 2.2)."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from billingd.sandbox.amplify import consumer, envelope, listing, patching
from billingd.sandbox.amplify.errors import Refused
from billingd.sandbox.amplify.kinds import BY_NAME, BY_PLURAL, Kind
from billingd.sandbox.amplify.resources import Json, Resource
from billingd.sandbox.amplify.tenant import Tenant

PATCH_TYPE: Final = "application/json-patch+json"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Target:
    """What a path names: a list of a kind, one resource, or a subresource of it."""

    def __init__(self, tenant: Tenant, info: dict[str, str]) -> None:
        self._tenant = tenant
        self.version = info["version"]
        steps = [info[key] for key in ("a", "b", "c", "d", "e") if key in info]
        self.kind = self._kind(info["group"], steps[0])
        self.scope: Resource | None = None
        self.name = ""
        self.subresource = ""
        self.unscoped_list = self.kind.scope is not None and len(steps) == 1
        self.label = self.kind.plural
        child = BY_PLURAL.get((info["group"], steps[2])) if len(steps) > 2 else None
        if child is not None and child.scope == self.kind.name:
            self.scope = self._found(self.kind, steps[1], None)
            self.label = f"{self.kind.plural}/{{name}}/{child.plural}"
            self.kind = self._kind(info["group"], steps[2])
            steps = steps[2:]
        elif self.kind.scope is not None and len(steps) > 1:
            raise Refused(404, f"{self.kind.name} lives below its {self.kind.scope}")
        if len(steps) > 3:
            raise Refused(404, "Unable to find resource")
        if len(steps) > 1:
            self.name = steps[1]
            self.label += "/{name}"
        if len(steps) > 2:
            self.subresource = steps[2]
            self.label += f"/{self.subresource}"

    def _kind(self, group: str, plural: str) -> Kind:
        kind = BY_PLURAL.get((group, plural))
        versions = self._tenant.settings.versions
        served = {"v1", "v1alpha1"} if versions == "both" else {"v1alpha1"}
        if versions == "mixed" and kind is not None and kind.early_v1:
            served = {"v1", "v1alpha1"}
        if kind is None or self.version not in served:
            raise Refused(404, "Unable to find resource type")
        return kind

    def resource(self) -> Resource:
        """The resource named by the path; Refused(404)."""
        return self._found(self.kind, self.name, self.scope)

    def _found(self, kind: Kind, name: str, scope: Resource | None) -> Resource:
        resource = self._tenant.resources.find(kind.name, name, scope)
        if resource is None:
            raise Refused(404, "Unable to find resource")
        return resource


class Api:
    """Handlers of `/apis/…`."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Every verb on every path of the API Server."""
        target = Target(self._tenant, dict(request.match_info))
        request["endpoint"] = f"/apis/{target.label}"
        if target.subresource:
            verbs: dict[str, Handler] = {"GET": self._get_subresource, "PUT": self._put_subresource}
        elif target.name:
            verbs = {"GET": self._get, "PUT": self._put, "PATCH": self._patch, "DELETE": self._delete}
        else:
            verbs = {"GET": self._list, "HEAD": self._list, "POST": self._post}
            if target.unscoped_list:
                del verbs["POST"]
        handler = verbs.get(request.method)
        if handler is None:
            raise Refused(405, f"{request.method} is not allowed here", headers={"Allow": ", ".join(verbs)})
        request["target"] = target
        return await handler(request)

    async def _list(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        resources = self._tenant.resources
        everything = resources.of_kind(target.kind.name, target.scope)
        chosen = listing.selected(resources, everything, target.kind, request.query)
        if self._tenant.settings.own_teams_only and request.query.get("count") != "all":
            chosen = []
        headers = {"X-Axway-Total-Count": str(len(chosen))}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        first, size = listing.page_of(request.query)
        if first + size < len(chosen):
            following = request.rel_url.update_query(page=str(first // size + 2))
            headers["Link"] = f"<{following}>; rel=next"
        page = chosen[first : first + size]
        shown = [listing.fields_only(each.shown(target.version), request.query) for each in page]
        return web.json_response(shown, headers=headers)

    async def _get(self, request: web.Request) -> web.Response:
        return self._answer(request, request["target"].resource())

    async def _post(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        sent = await _json_of(request)
        if target.kind.name == "Subscription":
            made = consumer.start(self._tenant, sent, None, version=target.version)
        else:
            made = self._tenant.create(target.kind.name, sent, scope=target.scope, version=target.version)
        return self._answer(request, made, status=201)

    async def _put(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        sent = await _json_of(request)
        return self._answer(request, self._tenant.replace(target.resource(), sent, version=target.version))

    async def _patch(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        if request.content_type != PATCH_TYPE:
            raise Refused(415, f"Content-Type must be {PATCH_TYPE}; got {request.content_type}")
        operations = await _json_of(request, any_type=True)
        resource = target.resource()
        shown = resource.shown(target.version)
        whole = patching.patched(shown, operations)
        if not self._tenant.settings.patch_attributes and whole["attributes"] != shown["attributes"]:
            raise Refused(400, "/attributes cannot be patched")
        changed = {key for key in {*whole, *shown} if whole.get(key) != shown.get(key)}
        if changed - set(envelope.OWN_FIELDS):
            raise Refused(400, f"{min(changed - set(envelope.OWN_FIELDS))}: cannot be patched")
        return self._answer(request, self._tenant.replace(resource, whole, version=target.version))

    async def _delete(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        forced = request.query.get("forceDelete", "false") == "true"
        gone = self._tenant.delete(target.resource(), force=forced)
        return web.Response(status=204 if gone else 202)

    async def _get_subresource(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        body = target.resource().body
        if target.subresource in envelope.RESERVED or target.subresource not in body:
            raise Refused(404, f"No subresource '{target.subresource}'")
        return web.json_response({target.subresource: body[target.subresource]})

    async def _put_subresource(self, request: web.Request) -> web.Response:
        target: Target = request["target"]
        resource = target.resource()
        sent = await _json_of(request)
        return self._answer(request, self._tenant.put_subresource(resource, target.subresource, sent))

    def _answer(self, request: web.Request, resource: Resource, status: int = 200) -> web.Response:
        shown: Json = resource.shown(request["target"].version)
        return web.json_response(listing.fields_only(shown, request.query), status=status)


async def _json_of(request: web.Request, *, any_type: bool = False) -> Any:
    if not any_type and request.content_type != "application/json":
        raise Refused(415, f"Content-Type must be application/json; got {request.content_type}")
    try:
        return json.loads(await request.read())
    except ValueError as error:
        raise Refused(400, f"The body is not JSON: {error}") from error


assert set(BY_NAME) == {kind.name for kind in BY_PLURAL.values()}  # a path for each kind, and no two alike
